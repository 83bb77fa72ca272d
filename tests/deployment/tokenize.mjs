// Tokenizes texts with the tokenizer.json of a folder in transformers.js under Node:
//     node tokenize.mjs FOLDER < texts.json > ids.json
import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";
import { AutoTokenizer, env } from "@huggingface/transformers";

const [folder] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const texts = JSON.parse(readFileSync(0, "utf8"));
const options = { add_special_tokens: false, return_tensor: false };
process.stdout.write(JSON.stringify(texts.map((text) => tokenizer(text, options).input_ids)));
