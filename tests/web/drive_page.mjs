// Draw on the page in headless Chromium and report what it answered, as JSON.
//
// node drive_page.mjs NODE_MODULES CHROMIUM REQUEST.json
//
// REQUEST: url, phone (whether to be one, and draw with a finger), drawings (lists of strokes in units of the pad's side),
// images (64 counts of ink each), screenshot (file or null).
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, executablePath, requestFile] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "from-here.js"))("playwright-core");
const { url, phone, drawings, images, screenshot } = JSON.parse(readFileSync(requestFile));

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox", // the tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
const device = phone
  ? { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, hasTouch: true, isMobile: true }
  : { viewport: { width: 1280, height: 900 } };
const context = await browser.newContext(device);
const page = await context.newPage();
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
page.on("requestfailed", (request) => errors.push(`${request.url()}: ${request.failure().errorText}`));
await page.goto(url);
await page.waitForFunction(() => document.body.dataset.ready !== undefined, undefined, { timeout: 60_000 });

const touch = await context.newCDPSession(page);

async function drawStroke(points) {
  const box = await page.locator("#pad").boundingBox();
  const places = points.map(([x, y]) => ({ x: box.x + x * box.width, y: box.y + y * box.height }));
  if (phone) {
    const send = (type, touchPoints) => touch.send("Input.dispatchTouchEvent", { type, touchPoints });
    await send("touchStart", [places[0]]);
    for (const place of places.slice(1)) await send("touchMove", [place]);
    return send("touchEnd", []);
  }
  await page.mouse.move(places[0].x, places[0].y);
  await page.mouse.down();
  for (const place of places.slice(1)) await page.mouse.move(place.x, place.y);
  return page.mouse.up();
}

const drawn = [];
for (const strokes of drawings) {
  await page.locator("#clear").click();
  await page.locator("#pad").scrollIntoViewIfNeeded();
  for (const stroke of strokes) await drawStroke(stroke);
  drawn.push(
    await page.evaluate(async () => {
      await window.kan.settled();
      const { pixels, logits, floats } = window.kan.shown;
      return {
        pixels: Array.from(pixels),
        logits: Array.from(logits),
        floats: Array.from(floats),
        digit: document.getElementById("digit").textContent,
        equal: document.body.dataset.equal,
      };
    }),
  );
}
const logits = await page.evaluate(async (all) => {
  const results = [];
  for (const pixels of all) results.push(await window.kan.logitsOf(pixels));
  return results;
}, images);
const layout = await page.evaluate(() => ({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  facts: document.getElementById("facts").textContent,
  steps: document.querySelectorAll("svg .curve").length,
}));
if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });
await browser.close();
console.log(JSON.stringify({ drawn, logits, layout, errors }));
