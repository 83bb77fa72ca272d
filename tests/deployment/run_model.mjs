// Runs a folder of export_onnx.py in transformers.js under Node:
//     node run_model.mjs FOLDER DTYPE < requests.json > answers.json
// A request is {text, pair} (pair may be null); an answer is {ids, logits}, the logits flat.
import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";
import * as library from "@huggingface/transformers";

const [folder, dtype] = process.argv.slice(2);
library.env.allowRemoteModels = false;
library.env.localModelPath = dirname(folder);
const name = basename(folder);
const config = JSON.parse(readFileSync(`${folder}/config.json`, "utf8"));
const head = config.architectures[0].split("For")[1];
const tokenizer = await library.AutoTokenizer.from_pretrained(name);
const model = await library[`AutoModelFor${head}`].from_pretrained(name, { dtype });
const answers = [];
for (const { text, pair } of JSON.parse(readFileSync(0, "utf8"))) {
  const inputs = tokenizer(text, { text_pair: pair });
  const { logits } = await model(inputs);
  answers.push({
    ids: Array.from(inputs.input_ids.data, Number),
    logits: Array.from(logits.data),
  });
}
process.stdout.write(JSON.stringify(answers));
