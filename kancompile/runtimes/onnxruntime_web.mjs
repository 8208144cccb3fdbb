// Load an ONNX file in onnxruntime-web (WebAssembly) under Node and run it as lines on standard input ask.
//
// node onnxruntime_web.mjs NODE_MODULES MODEL
//
// A line is JSON: {input, output, dimensions, rows_at_once} or {input, dimensions, calls}. INPUT and OUTPUT are files of raw
// little-endian float32; the dimensions are those of INPUT, the batch first. The answer is a line of JSON: {shape} of OUTPUT,
// {seconds} of every call with the whole INPUT, or {error}. The first line, {version}, comes when the file is loaded.
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";

const [modules, modelFile] = process.argv.slice(2);
const ort = createRequire(join(modules, "from-here.js"))("onnxruntime-web");
ort.env.wasm.numThreads = 1; // worker threads gain nothing here, and the answer must not depend on them
ort.env.logLevel = "error";

const session = await ort.InferenceSession.create(readFileSync(modelFile), { executionProviders: ["wasm"] });
const [inputName] = session.inputNames;
if (session.inputNames.length !== 1 || session.outputNames.length !== 1) {
  throw new Error(`found inputs ${session.inputNames} and outputs ${session.outputNames}, expected one of each`);
}
const [outputName] = session.outputNames;

function readInput(file, dimensions) {
  const bytes = readFileSync(file);
  return new Float32Array(bytes.buffer, bytes.byteOffset, dimensions.reduce((product, size) => product * size, 1));
}

async function call(values, dimensions) {
  return (await session.run({ [inputName]: new ort.Tensor("float32", values, dimensions) }))[outputName];
}

async function run({ input, output, dimensions, rows_at_once: rowsAtOnce }) {
  const [rows, ...sample] = dimensions;
  const width = sample.reduce((product, size) => product * size, 1);
  const values = readInput(input, dimensions);
  const file = openSync(output, "w");
  let shape = [];
  for (let first = 0; first < rows; first += rowsAtOnce) {
    const last = Math.min(rows, first + rowsAtOnce);
    const found = await call(values.slice(first * width, last * width), [last - first, ...sample]);
    if (found.type !== "float32") throw new Error(`found an output of type ${found.type}, expected float32`);
    shape = [rows, ...found.dims.slice(1)];
    writeSync(file, new Uint8Array(found.data.buffer, found.data.byteOffset, found.data.byteLength));
  }
  closeSync(file);
  return { shape };
}

async function time({ input, dimensions, calls }) {
  const values = readInput(input, dimensions);
  const seconds = [];
  for (let number = 0; number < calls; number++) {
    const start = process.hrtime.bigint();
    await call(values, dimensions);
    seconds.push(Number(process.hrtime.bigint() - start) * 1e-9);
  }
  return { seconds };
}

console.log(JSON.stringify({ version: ort.env.versions.web }));
for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  try {
    console.log(JSON.stringify(await ("calls" in asked ? time(asked) : run(asked))));
  } catch (error) {
    console.log(JSON.stringify({ error: `${error}`.split("\n")[0] }));
  }
}
