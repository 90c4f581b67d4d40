// The page: a field to draw in, what the net says of it, and what is inside.
"use strict";

const FIELD = 256;  // pixels of a side, on which strokes become ink
const MOST_BARS = 12;
if (data.likeness) {
  data.likeness.rows = new Int8Array(bytes(data.likeness.rows).buffer);
  data.likeness.steps = floats(data.likeness.steps);
}
const net = readNet(data), [HEIGHT, WIDTH] = data.shape, LAST = net.layers.length - 1;

// The drawing: strokes of points, in pixels of the field
let strokes = [], ink = makeInk(FIELD, FIELD), sample = null, chosen = null, picked = null;
// What is seen: grey levels, the passes of the net, probabilities, and what is worked out only when asked for
let seen = null;

function look(image) {
  const grey = data.deskew ? upright(image, WIDTH, HEIGHT) : Float32Array.from(image);
  const passes = forward(net, grey.map(level => level / 255));
  const logits = passes[LAST].values, probabilities = softmax(logits, data.temperature);
  const most = Math.max(...probabilities), label = probabilities.indexOf(most), {likeness} = data;
  const hidden = LAST ? passes[LAST].inputs : passes[0].inputs.map(level => (level - likeness?.mean) / likeness?.std);
  const distance = likeness ? distanceTo(likeness, label, most, grey, WIDTH, hidden) : 0;
  return {grey, passes, logits, probabilities, distance, gains: new Map()};
}

// What each value that goes into a layer gains for a class
function gainsOf(view, label, down) {
  const key = `${label} ${down}`;
  if (!view.gains.has(key))
    view.gains.set(key, backward(net, view.passes, LAST, only(data.classes.length, label), down));
  return view.gains.get(key);
}

// What each pixel adds to a class's logit
function pixelParts(view, label) {
  return gainsOf(view, label, 0).map((gain, i) => gain * view.grey[i] / 255);
}

// What a hidden unit adds to each class's logit
function unitParts(view, layer, unit) {
  const from = net.exact ? net.blank[layer].values[unit] : 0;
  return data.classes.map((_, label) =>
    gainsOf(view, label, layer + 1)[unit] * (view.passes[layer].values[unit] - from));
}

// ---- drawing

// A stroke's ink: full within its radius, fading over a pixel
function addSegment([x0, y0], [x1, y1], radius) {
  const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy, reach = radius + 1;
  const low = (a, b) => Math.max(0, Math.floor(Math.min(a, b) - reach));
  const high = (a, b) => Math.min(FIELD - 1, Math.ceil(Math.max(a, b) + reach));
  for (let row = low(y0, y1); row <= high(y0, y1); row++)
    for (let column = low(x0, x1); column <= high(x0, x1); column++) {
      const x = column + 0.5 - x0, y = row + 0.5 - y0;
      const along = length ? Math.min(1, Math.max(0, (x * dx + y * dy) / length)) : 0;
      const value = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(x - along * dx, y - along * dy)));
      const place = row * FIELD + column;
      if (value > ink.values[place]) ink.values[place] = value;
    }
}

function redraw() {
  ink.values.fill(0);
  for (const {points, radius} of strokes)
    points.forEach((point, i) => addSegment(points[Math.max(0, i - 1)], point, radius));
}

function pointOf(event) {
  const box = $("field").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * FIELD, (event.clientY - box.top) / box.height * FIELD];
}

let pointer = null, waiting = false;

function watchField() {
  const field = $("field");
  field.addEventListener("pointerdown", event => {
    if (pointer !== null || event.button > 0) return;
    event.preventDefault();
    pointer = event.pointerId;
    try { field.setPointerCapture(pointer); } catch { /* a pointer that has gone already */ }
    sample = null;
    strokes.push({points: [pointOf(event)], radius: $("width").value / 2});
    extend([]);
  });
  field.addEventListener("pointermove", event => {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    extend((events.length ? events : [event]).map(pointOf));
  });
  for (const kind of ["pointerup", "pointercancel"])
    field.addEventListener(kind, event => { if (event.pointerId === pointer) pointer = null; });
  $("undo").addEventListener("click", () => { strokes.pop(); sample = null; redraw(); update(); });
  $("clear").addEventListener("click", () => { strokes = []; sample = null; redraw(); update(); });
  document.addEventListener("keydown", event => {
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("undo").click(); }
  });
}

function extend(points) {
  const stroke = strokes[strokes.length - 1];
  if (!points.length) addSegment(stroke.points[0], stroke.points[0], stroke.radius);
  for (const point of points) {
    addSegment(stroke.points[stroke.points.length - 1], point, stroke.radius);
    stroke.points.push(point);
  }
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; update(); }); }
}

// ---- views

function drawnImage() {
  if (!strokes.length) return null;
  if (data.handwriting) return normalize(ink);
  return Uint8Array.from(resize(ink, WIDTH, HEIGHT).values, value => Math.floor(255 * value + 0.5));
}

function update() {
  const start = performance.now();
  const image = sample === null ? drawnImage() : data.samples.images[sample];
  seen = look(image ?? new Uint8Array(WIDTH * HEIGHT));
  seen.blank = !image;
  showField(); showAnswer(); showSeen(); showUnits();
  document.body.dataset.milliseconds = (performance.now() - start).toFixed(2);
  keep();
}

function rgb(name) {
  const hex = color(name).slice(1);
  return [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16));
}

// Grey levels, or with `limit` signed values, as a picture: one pixel each
function paint(canvas, values, width, height, {limit = 0, under = null} = {}) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  const [paper, dark, plus, minus] = ["paper", "ink", "for", "against"].map(rgb);
  for (let i = 0; i < width * height; i++) {
    const shade = limit ? Math.min(1, Math.abs(values[i]) / limit) : values[i] / 255;
    const top = !limit ? dark : values[i] > 0 ? plus : minus;
    const base = under ? 0.3 * under[i] / 255 : 0;
    for (let c = 0; c < 3; c++) {
      const below = paper[c] + base * (dark[c] - paper[c]);
      picture.data[4 * i + c] = below + shade * (top[c] - below);
    }
    picture.data[4 * i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function percent(share) {
  if (share > 0.999 && share < 1) return "> 99.9 %";
  if (share < 0.001 && share > 0) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

function showField() {
  const field = $("field"), context = field.getContext("2d"), zoom = field.width / FIELD;
  context.clearRect(0, 0, field.width, field.height);
  if (sample !== null) {
    const small = make("canvas");
    paint(small, data.samples.images[sample], WIDTH, HEIGHT);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, field.width, field.height);
    return;
  }
  context.strokeStyle = color("ink");
  context.lineCap = context.lineJoin = "round";
  for (const {points, radius} of strokes) {
    context.lineWidth = 2 * radius * zoom;
    context.beginPath();
    context.moveTo(points[0][0] * zoom, points[0][1] * zoom);
    for (const [x, y] of points) context.lineTo(x * zoom, y * zoom);
    context.stroke();
  }
}

// The labels, the most probable first
function ranking() {
  return data.classes.map((_, label) => label).sort((a, b) => seen.probabilities[b] - seen.probabilities[a]);
}

function showAnswer() {
  const [first, second] = ranking(), name = label => data.classes[label];
  const tell = label => `${name(label)}, ${percent(seen.probabilities[label])}`;
  const doubt = seen.probabilities[first] < data.sure ? "Not sure" : seen.distance > 1 ? data.likeness.nothing : "";
  const answer = seen.blank ? "Draw something" : doubt ? `${doubt}: ${tell(first)}; or ${tell(second)}` : tell(first);
  if ($("answer").textContent !== answer) $("answer").textContent = answer;
  const shown = data.classes.length <= MOST_BARS ? data.classes.map((_, label) => label)
    : ranking().slice(0, MOST_BARS);
  const bars = $("bars");
  while (bars.children.length < shown.length) {
    const button = make("button", {type: "button"}, make("span", {className: "name"}),
      make("span", {className: "bar"}, make("i")), make("span", {className: "percent"}));
    button.addEventListener("click", () => {
      const label = Number(button.dataset.label);
      chosen = chosen === label ? null : label;
      showAnswer(); showSeen(); keep();
    });
    bars.append(make("li", {}, button));
  }
  shown.forEach((label, place) => {
    const button = bars.children[place].firstChild, [nameCell, bar, number] = button.children;
    const share = seen.blank ? 0 : seen.probabilities[label];
    button.dataset.label = label;
    button.setAttribute("aria-pressed", chosen === label);
    nameCell.textContent = nameCell.title = name(label);
    bar.firstChild.style.width = `${100 * share}%`;
    number.textContent = seen.blank ? "–" : percent(share);
  });
}

function showSeen() {
  const canvas = $("seen"), logit = number => number.toFixed(2).replace("-", "−");
  if (chosen === null || seen.blank) {
    paint(canvas, seen.grey, WIDTH, HEIGHT);
    $("parts").textContent = `${WIDTH}×${HEIGHT} pixels` + (data.deskew ? ", set upright" : "");
    canvas.setAttribute("aria-label", seen.blank ? "Nothing yet" : "The image that the net sees");
    return;
  }
  const parts = pixelParts(seen, chosen), sum = parts.reduce((a, b) => a + b, 0);
  const limit = Math.max(...parts.map(Math.abs), 1e-9);
  paint(canvas, parts, WIDTH, HEIGHT, {limit, under: seen.grey});
  const rest = seen.logits[chosen] - sum;
  const told = `${data.classes[chosen]}: blue pixels speak for it, orange ones against it. Its logit `
    + `${logit(seen.logits[chosen])} is ${logit(rest)} ${net.exact ? "of a blank image" : "of the rest"} and `
    + `${logit(sum)} of these pixels` + (net.exact ? "." : " (gradient × input: not exact for this net).");
  $("parts").textContent = told;
  canvas.setAttribute("aria-label", told);
}

// ---- hidden units

function cellSize(count) { return count <= 256 ? 14 : count <= 1024 ? 9 : 7; }

function makeLayers() {
  $("inside").hidden = LAST === 0;
  for (let number = 0; number < LAST; number++) {
    const count = net.layers[number].outputs;
    const canvas = make("canvas", {tabIndex: 0});
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Layer ${number + 1}, ${count} units; arrow keys move from one to the next`);
    const pick = unit => {
      if (unit < 0 || unit >= count) return;
      picked = {layer: number, unit};
      showUnits(); keep();
    };
    const point = event => {
      const box = canvas.getBoundingClientRect(), size = cellSize(count), columns = canvas.columns;
      const column = Math.floor((event.clientX - box.left) / size);
      if (column < columns) pick(Math.floor((event.clientY - box.top) / size) * columns + column);
    };
    canvas.addEventListener("pointermove", event => { if (event.pointerType === "mouse") point(event); });
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", event => {
      const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: canvas.columns, ArrowUp: -canvas.columns};
      if (!(event.key in steps)) return;
      event.preventDefault();
      pick(picked?.layer === number ? picked.unit + steps[event.key] : 0);
    });
    $("layers").append(make("div", {className: "note", text: `layer ${number + 1}: ${count} units`}), canvas);
  }
}

function showUnits() {
  const canvases = $("layers").querySelectorAll("canvas");
  const [line, lit, against, text] = ["line", "lit", "against", "text"].map(color);
  canvases.forEach((canvas, number) => {
    const values = seen.passes[number].values, count = values.length, size = cellSize(count);
    const columns = canvas.columns = Math.max(1, Math.min(count, Math.floor($("layers").clientWidth / size)));
    const density = Math.min(2, devicePixelRatio || 1), rows = Math.ceil(count / columns);
    canvas.width = columns * size * density; canvas.height = rows * size * density;
    canvas.style.width = `${columns * size}px`;
    const context = canvas.getContext("2d"), most = Math.max(...values.map(Math.abs), 1e-9);
    context.scale(density, density);
    for (let unit = 0; unit < count; unit++) {
      const x = unit % columns * size, y = Math.floor(unit / columns) * size;
      context.fillStyle = line;
      context.globalAlpha = 0.45;
      context.fillRect(x, y, size - 1, size - 1);
      if (seen.blank || !values[unit]) continue;
      context.globalAlpha = Math.sqrt(Math.abs(values[unit]) / most);
      context.fillStyle = values[unit] < 0 ? against : lit;
      context.fillRect(x, y, size - 1, size - 1);
    }
    context.globalAlpha = 1;
    if (picked?.layer === number) {
      context.strokeStyle = text;
      context.lineWidth = 2;
      context.strokeRect(picked.unit % columns * size, Math.floor(picked.unit / columns) * size, size - 1, size - 1);
    }
  });
  if (picked) showUnit(picked.layer, picked.unit);
}

function showUnit(number, unit) {
  const layer = net.layers[number], first = number === 0;
  const weights = first && !layer.norm
    ? Array.from(layer.weights.subarray(unit * layer.inputs, (unit + 1) * layer.inputs), w => w * layer.scales[unit])
    : backward(net, seen.passes, number, only(layer.outputs, unit));
  const limit = Math.max(...weights.map(Math.abs), 1e-9);
  paint($("unit-picture"), weights, WIDTH, HEIGHT, {limit});
  const value = seen.passes[number].values[unit];
  $("unit-text").textContent = `Unit ${unit + 1} of layer ${number + 1} is at ${value.toFixed(2)}. The picture: `
    + (first ? "its weights" : "how it would change with each pixel") + ", blue +, orange −. It adds to each class:";
  const parts = unitParts(seen, number, unit), most = Math.max(...parts.map(Math.abs), 1e-9);
  const shown = data.classes.length <= MOST_BARS ? data.classes.map((_, label) => label)
    : ranking().slice(0, MOST_BARS);
  $("unit-adds").replaceChildren(...shown.map(label => {
    const part = parts[label], bar = make("i", {className: part < 0 ? "minus" : ""});
    bar.style.width = `${50 * Math.abs(part) / most}%`;
    bar.style[part < 0 ? "right" : "left"] = "50%";
    const number = `${part < 0 ? "−" : "+"}${Math.abs(part).toFixed(2)}`;
    return make("li", {}, make("span", {className: "name", text: data.classes[label]}),
      make("span", {className: "signed"}, bar), make("span", {className: "percent", text: number}));
  }));
}

// ---- images to try

function cut(all, count, size) {
  return Array.from({length: count}, (_, i) => all.subarray(i * size, (i + 1) * size));
}

function makeSamples() {
  const {labels, answers} = data.samples;
  data.samples.images = cut(spread(bytes(data.samples.images), labels.length * WIDTH * HEIGHT), labels.length,
    WIDTH * HEIGHT);
  $("tries").hidden = !labels.length;
  $("samples").append(...labels.map((label, index) => {
    const name = data.classes[label], wrong = answers[index] !== label, canvas = make("canvas");
    const told = wrong ? `${name} → ${data.classes[answers[index]]}` : name;
    const button = make("button", {type: "button"}, canvas, make("span", {text: told, className: wrong ? "wrong" : ""}));
    button.setAttribute("aria-label", wrong ? `${name}, read as ${data.classes[answers[index]]}` : name);
    button.addEventListener("click", () => { strokes = []; redraw(); sample = index; update(); });
    return button;
  }));
}

function paintSamples() {
  $("samples").querySelectorAll("canvas").forEach((canvas, index) =>
    paint(canvas, data.samples.images[index], WIDTH, HEIGHT));
}

// ---- a page that is written anew while the net learns

const STALE = 120;  // seconds after which nobody writes it any more

function keep() {
  if (!data.live) return;
  const state = {strokes, sample, chosen, picked, width: $("width").value, scroll: scrollY};
  try { sessionStorage.setItem(location.pathname, JSON.stringify(state)); } catch { /* then it starts anew */ }
}

function recall() {
  let state = null;
  try { state = JSON.parse(sessionStorage.getItem(location.pathname)); } catch { /* as above */ }
  if (data.live !== null && state) {
    ({strokes, sample, chosen, picked} = state);
    $("width").value = state.width;
    redraw();
    requestAnimationFrame(() => scrollTo(0, state.scroll));
  }
  if (!data.live) return;
  setInterval(() => {
    const late = Date.now() / 1000 - data.live > STALE;
    if (pointer === null && !late) { keep(); location.reload(); }
  }, 2000);
}

function start() {
  $("about").textContent = data.about;
  makeLayers(); makeSamples(); watchField();
  if (data.film) makeFilm();
  recall();
  const all = () => { paintSamples(); update(); if (film) showMoment(); };
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  addEventListener("resize", () => { showUnits(); });
}
