// Draw the staircase of an edge function, and where the present input stands on it, as SVG.

const WIDTH = 520;
const HEIGHT = 270;
const MARGIN = { left: 54, right: 14, top: 14, bottom: 52 };

/** Fill `svg` with the curve through (xs[r], ys[r]); `row` is marked unless it is null. */
export function drawCurve(svg, xs, ys, row, xLabel) {
  const half = (xs.at(-1) - xs[0]) / (xs.length - 1) / 2;
  const [left, right] = [xs[0] - half, xs.at(-1) + half];
  const [low, high] = spread(Math.min(0, ...ys), Math.max(0, ...ys));
  const x = (value) => MARGIN.left + ((value - left) / (right - left)) * (WIDTH - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren();
  const add = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
  };
  for (const tick of ticks(low, high)) {
    add("line", { class: tick === 0 ? "axis" : "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(tick), y2: y(tick) });
    add("text", { class: "tick", x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }, label(tick));
  }
  for (const tick of ticks(left, right)) {
    add("line", { class: "grid", x1: x(tick), x2: x(tick), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    add("text", { class: "tick", x: x(tick), y: HEIGHT - MARGIN.bottom + 20, "text-anchor": "middle" }, label(tick));
  }
  add("text", { class: "name", x: WIDTH - MARGIN.right, y: HEIGHT - 8, "text-anchor": "end" }, xLabel);
  let path = "";
  xs.forEach((value, r) => (path += `${r ? "L" : "M"}${x(value - half)} ${y(ys[r])}L${x(value + half)} ${y(ys[r])}`));
  add("path", { class: "curve", d: path });
  if (row !== null) {
    add("line", { class: "marker", x1: x(xs[row]), x2: x(xs[row]), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    add("circle", { class: "marker", cx: x(xs[row]), cy: y(ys[row]), r: 6 });
  }
}

function spread(low, high) {
  const room = (high - low || 1) * 0.08;
  return [low - room, high + room];
}

function ticks(low, high) {
  const raw = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let count = Math.ceil(low / step); count * step <= high; count++) found.push(count * step);
  return found;
}

function label(value) {
  return String(Number(value.toPrecision(3))).replace("-", "\u2212");
}
