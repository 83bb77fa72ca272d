// Loads the model beside this page and answers what is typed. page.json, which
// scripts/demo_page.py writes, says what the model is; nothing is fetched from another host.
import {
  AutoModelForMaskedLM,
  AutoModelForSequenceClassification,
  AutoTokenizer,
  Tensor,
  env,
} from "./library/transformers.js";

const MODELS = { AutoModelForMaskedLM, AutoModelForSequenceClassification };
const TOP_K = 5;
const element = (id) => document.getElementById(id);
const now = () => performance.now() / 1000;

function addElement(parent, tag, className, text) {
  const added = parent.appendChild(document.createElement(tag));
  added.className = className;
  added.textContent = text;
  return added;
}

function show(message, isError = false) {
  element("status").textContent = message;
  element("status").classList.toggle("error", isError);
}

// ---- the model -----------------------------------------------------------------------------------

async function load(page) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "./";
  env.useBrowserCache = false; // the browser keeps files by itself
  env.useWasmCache = false;
  env.backends.onnx.wasm.wasmPaths = {
    mjs: new URL("./library/onnxruntime-wasm.mjs", import.meta.url).href,
    wasm: new URL("./library/onnxruntime-wasm.wasm", import.meta.url).href,
  };
  env.fetch = fetchWithProgress;
  const options = { dtype: "q8", device: "wasm", local_files_only: true };
  return {
    page,
    tokenizer: await AutoTokenizer.from_pretrained("model", options),
    network: await MODELS[page.model_class].from_pretrained("model", options),
  };
}

// A progress_callback of transformers.js would download the model twice.
async function fetchWithProgress(address, options) {
  const response = await fetch(address, options);
  const total = Number(response.headers.get("content-length"));
  if (!response.ok || !total || !String(address).endsWith(".onnx")) return response;
  let received = 0;
  const count = new TransformStream({
    transform(piece, controller) {
      received += piece.byteLength;
      element("progress").value = received / total;
      controller.enqueue(piece);
    },
  });
  return new Response(response.body.pipeThrough(count), response);
}

function encode({ tokenizer }, text) {
  return tokenizer(text.trim(), { add_special_tokens: false, return_tensor: false }).input_ids;
}

// Cuts the longer of two texts first, then both to equal lengths, as in training.
function truncate(parts, room) {
  if (parts.length === 1) return [parts[0].slice(0, room)];
  const [first, second] = parts.map((ids) => ids.length);
  if (first + second <= room) return parts;
  const half = Math.floor(room / 2);
  if (Math.min(first, second) > half) {
    return [parts[0].slice(0, room - half), parts[1].slice(0, half)];
  }
  const long = room - Math.min(first, second);
  return parts.map((ids) => ids.slice(0, Math.min(ids.length, long)));
}

// Returns the inputs of one sequence: bos A eos, or bos A eos B eos.
function inputsOf({ page }, parts) {
  const room = page.max_len - 1 - parts.length;
  const total = parts.reduce((sum, ids) => sum + ids.length, 0);
  if (page.mask !== null && total > room) {
    throw new Error(`The text has ${total + 2} tokens, the model takes ${page.max_len}.`);
  }
  const ids = [page.bos_id];
  const types = [0];
  truncate(parts, room).forEach((part, number) => {
    ids.push(...part, page.eos_id);
    types.push(...Array(part.length + 1).fill(number));
  });
  const tensor = (values) =>
    new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const inputs = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
  if (page.token_types) inputs.token_type_ids = tensor(types);
  return { ids, inputs };
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const values = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = values.reduce((a, b) => a + b, 0);
  return values.map((value) => value / sum);
}

// Returns groups of rows: {title, rows: [{name, value, share}]}; a share is the length of a bar.
async function answer(loaded, texts) {
  const { page, network } = loaded;
  const { ids, inputs } = inputsOf(loaded, texts.map((text) => encode(loaded, text)));
  const { logits } = await network(inputs);
  if (!logits.data.every(Number.isFinite)) throw new Error("The model's logits are not finite.");
  if (page.mask !== null) return masks(loaded, ids, logits);
  if (page.labels.length === 0) return [score(page, logits.data[0])];
  const rows = softmax(logits.data).map((share, index) => ({
    name: page.labels[index],
    value: percent(share),
    share,
  }));
  return [{ title: "", rows }];
}

function score({ low, high }, logit) {
  const hasRange = low !== null;
  const value = hasRange ? Math.min(Math.max(logit, low), high) : logit;
  const share = hasRange ? (value - low) / (high - low) : null;
  const title = hasRange ? `Score from ${low} to ${high}` : "Score";
  return { title, rows: [{ name: "score", value: value.toFixed(3), share }] };
}

function masks(loaded, ids, logits) {
  const { page } = loaded;
  const size = logits.dims[2];
  const places = ids.flatMap((id, place) => (id === page.mask_id ? [place] : []));
  if (places.length === 0) throw new Error(`Write ${page.mask} where a word is missing.`);
  return places.map((place, number) => ({
    title: places.length === 1 ? "" : `${page.mask} number ${number + 1}`,
    rows: bestWords(loaded, softmax(logits.data.subarray(place * size, (place + 1) * size))),
  }));
}

function bestWords({ page, tokenizer }, probabilities) {
  for (const id of page.special_ids) probabilities[id] = -1;
  const best = [...probabilities.keys()]
    .sort((a, b) => probabilities[b] - probabilities[a])
    .slice(0, TOP_K);
  return best.map((id) => {
    const share = probabilities[id];
    const name = page.tokens[id] ?? tokenizer.decode([id]).trim();
    return { name, value: percent(share), share };
  });
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0095 ? 2 : 1)} %`;
}

// ---- the page ------------------------------------------------------------------------------------

function prepareForm(page) {
  document.title = page.title;
  element("title").textContent = page.title;
  element("subtitle").textContent = page.subtitle;
  for (const field of page.fields) {
    const label = addElement(element("fields"), "label", "", field);
    const area = addElement(label, "textarea", "", page.example);
    area.spellcheck = false;
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        if (!element("submit").disabled) element("form").requestSubmit();
      }
    });
  }
  if (page.mask !== null) prepareInsert(page.mask);
}

function prepareInsert(mask) {
  const button = element("insert");
  const area = document.querySelector("textarea");
  button.textContent = `Insert ${mask}`;
  button.hidden = false;
  button.addEventListener("click", () => {
    area.setRangeText(mask, area.selectionStart, area.selectionEnd, "end");
    area.focus();
  });
}

function draw(groups) {
  element("answer").replaceChildren();
  for (const { title, rows } of groups) {
    const group = addElement(element("answer"), "div", "group", "");
    if (title) addElement(group, "h2", "", title);
    const largest = Math.max(...rows.map((row) => row.share ?? 0));
    for (const row of rows) {
      const isBest = row.share === null || row.share === largest;
      const line = addElement(group, "div", isBest ? "row best" : "row", "");
      line.dataset.share = row.share ?? "";
      addElement(line, "span", "name", row.name);
      if (row.share === null) addElement(line, "span", "", "");
      else {
        const bar = addElement(addElement(line, "div", "track", ""), "div", "bar", "");
        bar.style.width = `${100 * row.share}%`;
      }
      addElement(line, "span", "value", row.value);
    }
  }
}

async function predict(loaded) {
  const values = [...document.querySelectorAll("textarea")].map((area) => area.value);
  const { required } = loaded.page; // so many texts; the model takes those after them, too
  const texts = values.filter((text, number) => number < required || text.trim() !== "");
  element("submit").disabled = true;
  try {
    if (texts.some((text) => text.trim() === "")) throw new Error("Type a text first.");
    const start = now();
    draw(await answer(loaded, texts));
    show(`Answered in ${Math.round(1000 * (now() - start))} ms, in this browser: nothing that you type leaves it.`);
  } catch (error) {
    element("answer").replaceChildren();
    show(error.message, true);
  } finally {
    element("submit").disabled = false;
  }
}

async function start() {
  const started = now();
  const page = await (await fetch("page.json")).json();
  prepareForm(page);
  show(`Loading the model, ${page.megabytes} MB.`);
  const loaded = await load(page);
  element("progress").hidden = true;
  element("submit").disabled = false;
  show(`The model is loaded (${(now() - started).toFixed(1)} s). It runs in this browser: nothing that you type leaves it.`);
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    predict(loaded);
  });
}

start().catch((error) => {
  element("progress").hidden = true;
  show(`The model cannot be loaded: ${error.message}`, true);
});
