// From pen strokes to the 64 pixels that the network was trained on.
//
// Its images (UCI optical digits, as in scikit-learn) began as bitmaps of 32 x 32, scaled to the full height, with lines
// thickened or thinned to about equal ink; each of the 8 x 8 pixels counts the ink in a block of 4 x 4.
// Strokes are lists of points [x, y], y downwards, in any unit.

export const SIDE = 8;
export const INK_LEVELS = 16;
const BITMAP = 32;
const BLOCK = BITMAP / SIDE;
const INK = 310; // mean ink of the training images, which hardly depends on the digit
const WIDTH = 18; // to which digits are squeezed or stretched, as far as STRETCH allows
const STRETCH = [0.6, 1.3];
const RADIUS = [1.4, 4];

/** Count ink per block: Uint8Array of 64 values 0 ... 16, or null where nothing is drawn. */
export function pixelsOf(strokes) {
  const drawn = strokes.filter((stroke) => stroke.length > 0);
  if (drawn.length === 0) return null;
  let radius = 2.2;
  let distances;
  for (let turn = 0; turn < 4; turn++) {
    distances = distancesTo(fit(drawn, radius));
    const nearest = Float64Array.from(distances).sort();
    radius = Math.min(RADIUS[1], Math.max(RADIUS[0], (radius + nearest[INK]) / 2));
  }
  const pixels = new Uint8Array(SIDE * SIDE);
  distances.forEach((distance, at) => {
    const row = Math.floor(at / BITMAP / BLOCK);
    const column = Math.floor((at % BITMAP) / BLOCK);
    if (distance <= radius) pixels[row * SIDE + column]++;
  });
  return pixels;
}

/** Turn counts of ink into the network's input, -1 ... 1. */
export function inputOf(pixels) {
  return Float32Array.from(pixels, (count) => count / 8 - 1);
}

/** Scale strokes so that lines of that radius fill the bitmap's height, and centre them. */
function fit(strokes, radius) {
  const points = strokes.flat();
  const [left, right] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const [top, bottom] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const room = BITMAP - 2 * radius;
  const down = room / Math.max(bottom - top, (right - left) * 0.5, 1e-9);
  const wanted = (WIDTH - 2 * radius) / Math.max(right - left, 1e-9);
  const across = Math.min(down * STRETCH[1], Math.max(down * STRETCH[0], wanted), room / Math.max(right - left, 1e-9));
  const centre = BITMAP / 2;
  return strokes.map((stroke) =>
    stroke.map(([x, y]) => [(x - (left + right) / 2) * across + centre, (y - (top + bottom) / 2) * down + centre]),
  );
}

/** Distance of every bitmap pixel's centre to the nearest line. */
function distancesTo(strokes) {
  const distances = new Float64Array(BITMAP * BITMAP).fill(Infinity);
  for (const stroke of strokes) {
    for (let i = 0; i < stroke.length; i++) {
      const [ax, ay] = stroke[Math.max(0, i - 1)];
      const [bx, by] = stroke[i];
      const [dx, dy] = [bx - ax, by - ay];
      const squared = dx * dx + dy * dy;
      for (let at = 0; at < distances.length; at++) {
        const px = (at % BITMAP) + 0.5 - ax;
        const py = Math.floor(at / BITMAP) + 0.5 - ay;
        const along = squared > 0 ? Math.min(1, Math.max(0, (px * dx + py * dy) / squared)) : 0;
        const distance = Math.hypot(px - along * dx, py - along * dy);
        if (distance < distances[at]) distances[at] = distance;
      }
    }
  }
  return distances;
}
