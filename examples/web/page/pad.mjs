// The drawing area: strokes by mouse, finger or pen, kept as points in units of its side.

export class Pad {
  /** `changed(strokes)` is called whenever the drawing does. */
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.strokes = [];
    this.backdrop = null;
    this.pen = null;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.end(event));
    new ResizeObserver(() => this.paint()).observe(canvas);
  }

  begin(event) {
    if (this.pen !== null || event.button > 0) return;
    event.preventDefault();
    this.pen = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    if (this.backdrop !== null) this.strokes = [];
    this.backdrop = null;
    this.strokes.push([this.place(event)]);
    this.update();
  }

  move(event) {
    if (event.pointerId !== this.pen) return;
    const between = event.getCoalescedEvents?.() ?? [];
    for (const part of between.length > 0 ? between : [event]) this.strokes.at(-1).push(this.place(part));
    this.update();
  }

  end(event) {
    if (event.pointerId === this.pen) this.pen = null;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  clear() {
    this.strokes = [];
    this.backdrop = null;
    this.update();
  }

  /** Show an image of 8 x 8 instead of strokes. */
  show(pixels) {
    this.strokes = [];
    this.backdrop = pixels;
    this.paint();
  }

  update() {
    this.paint();
    this.changed(this.strokes);
  }

  paint() {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio);
    if (this.canvas.width !== side) [this.canvas.width, this.canvas.height] = [side, side];
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.canvas);
    context.clearRect(0, 0, side, side);
    context.fillStyle = context.strokeStyle = style.color;
    this.backdrop?.forEach((count, at) => {
      context.globalAlpha = count / 16;
      context.fillRect(((at % 8) * side) / 8, (Math.floor(at / 8) * side) / 8, side / 8, side / 8);
    });
    context.globalAlpha = 1;
    context.lineWidth = side * 0.07;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
      for (const [x, y] of stroke) context.lineTo(x * side, y * side);
      context.stroke();
    }
  }
}
