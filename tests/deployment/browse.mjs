// Opens a demo page in headless Chromium, types texts and prints what the page shows:
//     node browse.mjs URL SCREENSHOT [logits] < texts.json > seen.json
// texts.json is a list of inputs, each a list of one or two texts. Printed are the rows and the
// status of each answer, the logits of the page's own model for each input as the page's library and
// tokenizer give them, all addresses that were fetched, all errors, and the seconds until the first
// answer.
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

// Runs in the page.
async function logitsOf(all) {
  const library = await import(new URL("library/transformers.js", location));
  const { model_class } = await (await fetch("page.json")).json();
  const tokenizer = await library.AutoTokenizer.from_pretrained("model");
  const found = [];
  for (const dtype of ["fp32", "q8"]) {
    const model = await library[model_class].from_pretrained("model", { dtype });
    for (const [text, text_pair = null] of all) {
      const inputs = tokenizer(text, { text_pair });
      const { logits } = await model(inputs);
      const ids = Array.from(inputs.input_ids.data, Number);
      found.push({ dtype, ids, logits: Array.from(logits.data) });
    }
  }
  return found;
}

const [url, screenshot] = process.argv.slice(2);
const inputs = JSON.parse(readFileSync(0, "utf8"));
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: [
    ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
    ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
  ],
});
const page = await browser.newPage({ viewport: { width: 900, height: 760 } });
const seen = { answers: [], addresses: [], errors: [] };
page.on("request", (request) => seen.addresses.push(request.url()));
page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
page.on("pageerror", (error) => seen.errors.push(String(error)));

const start = performance.now();
await page.goto(url);
if (url.startsWith("http")) {
  await page.waitForSelector("#submit:not([disabled]), #status.error", { timeout: 120000 });
}
seen.loaded = await page.textContent("#status");
const isReady = await page.isEnabled("#submit");
for (const texts of isReady ? inputs : []) {
  const areas = await page.locator("textarea").all();
  for (const [number, text] of texts.entries()) await areas[number].fill(text);
  await page.click("#submit");
  await page.waitForSelector("#submit:not([disabled])", { timeout: 120000 });
  seen.seconds ??= (performance.now() - start) / 1000;
  seen.answers.push({
    status: await page.textContent("#status"),
    rows: await page.$$eval(".row", (rows) =>
      rows.map((row) => ({
        name: row.querySelector(".name").textContent,
        value: row.querySelector(".value").textContent,
        share: row.dataset.share,
      })),
    ),
  });
}
await page.screenshot({ path: screenshot, fullPage: true });
seen.title = await page.title();
if (process.argv[4] === "logits") seen.logits = await page.evaluate(logitsOf, inputs);
await browser.close();
process.stdout.write(JSON.stringify(seen));
