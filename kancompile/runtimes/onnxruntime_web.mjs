// Run an ONNX file in onnxruntime-web (WebAssembly) under Node.
//
// node onnxruntime_web.mjs NODE_MODULES MODEL INPUT OUTPUT ROWS_AT_ONCE DIMENSION...
//
// INPUT and OUTPUT are raw little-endian float32; the dimensions are those of INPUT, the batch first. Prints one line of
// JSON: the shape of OUTPUT and the version of the runtime.
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, modelFile, inputFile, outputFile, rowsAtOnce, ...sizes] = process.argv.slice(2);
const ort = createRequire(join(modules, "from-here.js"))("onnxruntime-web");
ort.env.wasm.numThreads = 1; // worker threads gain nothing here, and the answer must not depend on them
ort.env.logLevel = "error";

const [rows, ...sample] = sizes.map(Number);
const width = sample.reduce((product, size) => product * size, 1);
const bytes = readFileSync(inputFile);
const values = new Float32Array(bytes.buffer, bytes.byteOffset, rows * width);

const session = await ort.InferenceSession.create(readFileSync(modelFile), { executionProviders: ["wasm"] });
const [inputName] = session.inputNames;
if (session.inputNames.length !== 1 || session.outputNames.length !== 1) {
  throw new Error(`found inputs ${session.inputNames} and outputs ${session.outputNames}, expected one of each`);
}
const [outputName] = session.outputNames;
const file = openSync(outputFile, "w");
let shape = [];
for (let first = 0; first < rows; first += Number(rowsAtOnce)) {
  const last = Math.min(rows, first + Number(rowsAtOnce));
  const part = values.slice(first * width, last * width);
  const outputs = await session.run({ [inputName]: new ort.Tensor("float32", part, [last - first, ...sample]) });
  const output = outputs[outputName];
  if (output.type !== "float32") throw new Error(`found an output of type ${output.type}, expected float32`);
  shape = [rows, ...output.dims.slice(1)];
  writeSync(file, new Uint8Array(output.data.buffer, output.data.byteOffset, output.data.byteLength));
}
closeSync(file);
console.log(JSON.stringify({ shape, version: ort.env.versions.web }));
