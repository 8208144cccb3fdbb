// The integers of the compiled file, read from the JSON beside it: edge functions, and the network's own arithmetic.
//
// A layer looks up k codes for each input in a table of `levels` rows and adds them up with integer weights:
//
//     row  = the table row of an input
//     sum  = bias[o] + sum over i, k of weights[i, k, o] * table[row_i, k]          integers
//     y[o] = float32(sum) * unit[o]                                                 or the row of the next table
//
// So the function on the edge from i to o is a staircase of `levels` steps, unit[o] * sum over k of weights * codes.

/** Load a network written by `examples.web.build`. */
export async function loadNetwork(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const { layers, ...rest } = await response.json();
  return { ...rest, layers: layers.map(decode) };
}

function decode(layer) {
  return {
    ...layer,
    table: bytes(layer.table),
    weights: new Int8Array(bytes(layer.weights).buffer),
    unit: Float32Array.from(layer.unit),
  };
}

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/** Round half to even, as IEEE rint does; Math.round would round ties up. */
function rint(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

/** Table rows of a layer's inputs. */
export function rowsOf(layer, values) {
  if (layer.reads === "index") return values;
  const last = layer.levels - 1;
  return Int32Array.from(values, (value) => {
    const row =
      layer.reads === "scaled"
        ? Math.trunc(value) // the layer before already hands over units of rows
        : rint(Math.fround(value / Math.fround(layer.scale))) + layer.zero_point;
    return Math.min(last, Math.max(0, row));
  });
}

/** Outputs of a layer: float32, or row numbers where the next layer reads those. */
export function outputsOf(layer, rows) {
  const { k, n_out, table, weights, hands_over } = layer;
  const sums = Int32Array.from(layer.bias);
  rows.forEach((row, input) => {
    for (let column = 0; column < k; column++) {
      const code = table[row * k + column];
      const first = (input * k + column) * n_out;
      for (let output = 0; code !== 0 && output < n_out; output++) sums[output] += weights[first + output] * code;
    }
  });
  if (hands_over === null) return Float32Array.from(sums, (sum, output) => Math.fround(sum) * layer.unit[output]);
  const { scale, zero_point, levels } = hands_over;
  return Int32Array.from(sums, (sum, output) => {
    const factor = Math.fround(layer.unit[output] / Math.fround(scale));
    const row = rint(Math.fround(Math.fround(sum) * factor)) + zero_point;
    return Math.min(levels - 1, Math.max(0, row));
  });
}

/** Evaluate all layers: `{ rows: rows read by each layer, logits }`. */
export function evaluate(network, input) {
  const rows = [];
  let values = input;
  for (const layer of network.layers) {
    rows.push(rowsOf(layer, values));
    values = outputsOf(layer, rows.at(-1));
  }
  return { rows, logits: values };
}

/** The function on the edge from `input` to `output`: its value at every row, Float64Array [levels]. */
export function edgeOf(layer, input, output) {
  const { k, n_out, levels, table, weights, offset } = layer;
  const values = new Float64Array(levels);
  for (let column = 0; column < k; column++) {
    const weight = weights[(input * k + column) * n_out + output] * layer.unit[output] * layer.real_per_output;
    for (let row = 0; row < levels; row++) values[row] += weight * (table[row * k + column] + offset[column]);
  }
  return values;
}

/** The real input that a row stands for. */
export function inputAt(layer, row) {
  return (row - layer.zero_point) * layer.scale;
}

/** The input whose edge to `output` differs most from that edge's mean, for the rows at hand. */
export function strongestInput(layer, rows, output) {
  let [best, most] = [0, -1];
  rows.forEach((row, input) => {
    const values = edgeOf(layer, input, output);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const share = Math.abs(values[row] - mean);
    if (share > most) [best, most] = [input, share];
  });
  return best;
}
