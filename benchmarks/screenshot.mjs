// Open a page in headless Chromium and save the first pixels of it.
//
// node screenshot.mjs NODE_MODULES ADDRESS PICTURE.png WIDTH HEIGHT [SELECTOR TO CLICK]
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, address, path, width, height, click] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "from-here.js"))("playwright-core");
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
const page = await browser.newPage({ viewport: { width: Number(width), height: Number(height) } });
await page.goto(address);
if (click) {
  await page.waitForFunction(() => document.body.dataset.ready !== undefined);
  await page.click(click);
  await page.waitForTimeout(500);
}
await page.screenshot({ path });
await browser.close();
