// The page: a drawing goes to pixels, pixels to onnxruntime-web, its logits to bars; the curves come from the same integers.

import * as ort from "./ort/ort.wasm.min.mjs";
import { drawCurve } from "./curve.mjs";
import { edgeOf, evaluate, inputAt, loadNetwork, rowsOf, strongestInput } from "./network.mjs";
import { Pad } from "./pad.mjs";
import { INK_LEVELS, SIDE, inputOf, pixelsOf } from "./strokes.mjs";

const element = (id) => document.getElementById(id);
const chosen = { pixel: null, hidden: null, digit: null }; // null: follow the strongest
const shown = { pixels: null, rows: null, logits: null, floats: null };
let network, integers, floats, waiting, running;

async function start() {
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  ort.env.wasm.numThreads = 1; // more would need cross-origin isolation, and one takes microseconds
  integers = await load("digits.onnx");
  floats = await load("digits.float.onnx");
  network = await loadNetwork("digits.json");
  element("hidden").max = network.layers[0].n_out - 1;
  makeControls();
  await classify(null);
  document.body.dataset.ready = "yes";
}

async function load(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const one = { session, kilobytes: (bytes.length / 1000).toFixed(0) };
  await answer(one, new Float32Array(SIDE * SIDE)); // the first run takes longer
  return one;
}

/** Run one of the two files on one input: its logits, and how long that took. */
async function answer({ session }, input) {
  const begin = performance.now();
  const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", input, [1, input.length]) });
  return { logits: outputs[session.outputNames[0]].data, milliseconds: performance.now() - begin };
}

function makeControls() {
  const pad = new Pad(element("pad"), (strokes) => classify(pixelsOf(strokes)));
  element("clear").addEventListener("click", () => pad.clear());
  element("pixels").replaceChildren(
    ...Array.from({ length: SIDE * SIDE }, (_, at) =>
      makeButton(() => choose({ pixel: at }), "", `Pixel in row ${Math.floor(at / SIDE)}, column ${at % SIDE}`),
    ),
  );
  element("bars").replaceChildren(
    ...Array.from({ length: 10 }, (_, digit) => {
      const button = makeButton(() => choose({ digit }), "", `Digit ${digit}`);
      button.innerHTML =
        `<span>${digit}</span><span class="track"><span class="fill"></span><span class="float"></span></span>` +
        `<span class="share"></span><span class="logit"></span><span class="logit of-float"></span>`;
      return button;
    }),
  );
  element("examples").replaceChildren(
    ...network.examples.map(({ label, pixels }) => {
      const button = makeButton(() => (pad.show(pixels), classify(Uint8Array.from(pixels))), "", `Test image of a ${label}`);
      button.append(thumbnail(pixels));
      return button;
    }),
  );
  element("hidden").addEventListener("change", () => {
    const unit = Math.round(Number(element("hidden").value));
    choose({ hidden: Math.min(network.layers[0].n_out - 1, Math.max(0, Number.isFinite(unit) ? unit : 0)) });
  });
  element("strongest").addEventListener("click", () => choose({ pixel: null, hidden: null, digit: null }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => pad.paint());
}

function makeButton(action, text, name) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.setAttribute("aria-label", name);
  button.addEventListener("click", action);
  return button;
}

function thumbnail(pixels) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  pixels.forEach((count, at) => {
    context.fillStyle = `rgb(110 120 150 / ${count / INK_LEVELS})`;
    context.fillRect(at % SIDE, Math.floor(at / SIDE), 1, 1);
  });
  return canvas;
}

function choose(choice) {
  Object.assign(chosen, choice);
  render();
}

/** Run the network on 64 counts of ink (null: nothing drawn). While a run is under way only the newest image waits. */
async function classify(pixels) {
  waiting = { pixels };
  running ??= (async () => {
    while (waiting) {
      const next = waiting.pixels;
      waiting = undefined;
      await run(next);
    }
    running = undefined;
  })().catch(fail);
  await running;
}

async function run(pixels) {
  shown.pixels = pixels;
  if (pixels === null) {
    shown.rows = shown.logits = shown.floats = null;
    return render();
  }
  const input = inputOf(pixels);
  const found = await answer(integers, input);
  const exact = await answer(floats, input);
  const own = evaluate(network, input);
  shown.rows = own.rows;
  shown.logits = found.logits;
  shown.floats = exact.logits;
  const equal = sameBits(own.logits, found.logits);
  const furthest = Math.max(...Array.from(found.logits, (logit, at) => Math.abs(logit - exact.logits[at])));
  render();
  element("facts").textContent =
    `Integers: ${integers.kilobytes} kB, ${found.milliseconds.toFixed(1)} ms. Float model: ${floats.kilobytes} kB, ` +
    `${exact.milliseconds.toFixed(1)} ms; logits differ by at most ${furthest.toFixed(2)}. ` +
    `Both in onnxruntime-web ${ort.env.versions.web}. The same integers added up in JavaScript give ` +
    (equal ? "the same ten logits, bit for bit." : "other logits: this is a bug.");
  document.body.dataset.equal = equal ? "yes" : "no";
}

function sameBits(a, b) {
  const [x, y] = [new Uint32Array(Float32Array.from(a).buffer), new Uint32Array(Float32Array.from(b).buffer)];
  return x.length === y.length && x.every((bits, at) => bits === y[at]);
}

function softmax(logits) {
  const powers = Array.from(logits, (logit) => Math.exp(logit - Math.max(...logits)));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

function render() {
  const { pixels, logits } = shown;
  const shares = logits === null ? null : softmax(logits);
  const best = logits === null ? null : logits.indexOf(Math.max(...logits));
  const floatShares = shown.floats === null ? null : softmax(shown.floats);
  const floatBest = shown.floats === null ? null : shown.floats.indexOf(Math.max(...shown.floats));
  const path = pathOf(best);
  element("digit").textContent = best ?? "–";
  element("certainty").textContent =
    best === null
      ? "Draw something"
      : `${percent(shares[best])} sure; the float model says ${floatBest}, ${percent(floatShares[floatBest])} sure`;
  [...element("pixels").children].forEach((button, at) => {
    button.style.setProperty("--ink-share", pixels === null ? 0 : pixels[at] / INK_LEVELS);
    button.classList.toggle("chosen", at === path.pixel);
  });
  [...element("bars").children].forEach((button, digit) => {
    button.querySelector(".fill").style.width = shares === null ? 0 : `${100 * shares[digit]}%`;
    button.querySelector(".share").textContent = shares === null ? "" : `${(100 * shares[digit]).toFixed(1)} %`;
    button.querySelector(".float").style.left = floatShares === null ? "-9px" : `${100 * floatShares[digit]}%`;
    button.querySelector(".logit").textContent = logits === null ? "" : signed(logits[digit]);
    button.querySelector(".of-float").textContent = shown.floats === null ? "" : signed(shown.floats[digit]);
    button.classList.toggle("best", digit === best);
    button.classList.toggle("chosen", digit === path.digit);
  });
  renderCurves(path);
  if (pixels === null) element("facts").textContent = `${integers.kilobytes} kB of model, ready.`;
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0.995 ? 1 : 0)} %`;
}

function signed(logit) {
  return logit.toFixed(2).replace("-", "\u2212");
}

/** The pixel, hidden unit and digit whose functions are drawn. */
function pathOf(best) {
  const [first, second] = network.layers;
  const rows = shown.rows ?? [rowsOf(first, inputOf(new Uint8Array(SIDE * SIDE))), null];
  const digit = chosen.digit ?? best ?? 0;
  const hidden = chosen.hidden ?? (rows[1] === null ? 0 : strongestInput(second, rows[1], digit));
  const pixel = chosen.pixel ?? (shown.rows === null ? 27 : strongestInput(first, rows[0], hidden));
  return { pixel, hidden, digit };
}

function renderCurves({ pixel, hidden, digit }) {
  const followed = Object.values(chosen).every((choice) => choice === null);
  element("strongest").setAttribute("aria-pressed", String(followed));
  element("hidden").value = hidden;
  const place = `row ${Math.floor(pixel / SIDE)}, column ${pixel % SIDE}`;
  element("first-name").textContent = `Pixel in ${place} → hidden unit ${hidden}`;
  element("second-name").textContent = `Hidden unit ${hidden} → digit ${digit}`;
  curveOf(element("first"), 0, pixel, hidden, "ink, −1 to 1");
  curveOf(element("second"), 1, hidden, digit, `value of hidden unit ${hidden}`);
}

function curveOf(svg, at, input, output, label) {
  const layer = network.layers[at];
  const xs = Array.from({ length: layer.levels }, (_, row) => inputAt(layer, row));
  drawCurve(svg, xs, Array.from(edgeOf(layer, input, output)), shown.rows?.[at][input] ?? null, label);
}

function fail(error) {
  element("facts").className = "failed";
  element("facts").textContent = `Something failed: ${error.message}`;
  document.body.dataset.ready = "failed";
  throw error;
}

// for tests and the curious: what is shown, when no run is under way, and the logits of any 64 counts of ink
window.kan = {
  shown,
  settled: () => running ?? Promise.resolve(),
  logitsOf: async (pixels) => {
    const input = inputOf(pixels);
    return Array.from((await answer(integers, input)).logits);
  },
};
start().catch(fail);
