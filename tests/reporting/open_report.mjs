// Open a report in headless Chromium and say, as JSON, what a reader would notice: width, errors, requests, sections.
//
// node open_report.mjs NODE_MODULES CHROMIUM FILE.html WIDTH SCHEME
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, executablePath, file, width, colorScheme] = process.argv.slice(2);
const { chromium } = createRequire(join(modules, "from-here.js"))("playwright-core");
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
const context = await browser.newContext({ viewport: { width: Number(width), height: 800 }, colorScheme });
const page = await context.newPage();
const errors = [];
const requests = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => errors.push(message.text()));
page.on("request", (request) => requests.push(request.url()));
await page.goto(pathToFileURL(file).href);
const seen = await page.evaluate(() => ({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  paper: getComputedStyle(document.body).backgroundColor,
  plots: [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect().width),
  scripts: document.querySelectorAll("script").length,
  sections: [...document.querySelectorAll("section")].map((section) => section.id),
  scrolls: [...document.querySelectorAll(".scroll")].every((box) => box.clientWidth <= innerWidth),
}));
await browser.close();
const local = requests.filter((url) => url.startsWith("file:") || url.startsWith("data:"));
console.log(JSON.stringify({ ...seen, errors, foreign: requests.length - local.length, files: local.filter((url) => url.startsWith("file:")).length }));
