// From the ink of a drawing to the image that a net sees: mnist_lightning/images/normalize.py, restated operation
// by operation.  An ink is {width, height, values}, row by row, in [0, 1].
"use strict";

const SIDE = 28, BOX = 20, CENTER = 14, WORK_BOX = 160, STROKE = 2.4, THRESHOLD = 0.1;

function makeInk(width, height) { return {width, height, values: new Float64Array(width * height)}; }
function round(value) { return Math.floor(value + 0.5 + 1e-9); }

// The smallest rectangle that holds all ink; null where there is none
function crop({width, height, values}) {
  let top = height, bottom = 0, left = width, right = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (values[y * width + x] > THRESHOLD) {
        top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
        left = Math.min(left, x); right = Math.max(right, x + 1);
      }
  if (!bottom) return null;
  const cropped = makeInk(right - left, bottom - top);
  for (let y = top; y < bottom; y++)
    cropped.values.set(values.subarray(y * width + left, y * width + right), (y - top) * cropped.width);
  return cropped;
}

// The weights of the old pixels in each new one, along an axis: [first, weights]
function weigh(size, newSize) {
  const step = size / newSize;
  return Array.from({length: newSize}, (_, place) => {
    const weights = [];
    if (newSize < size) {
      const start = place * step, end = start + step, first = Math.floor(start);
      for (let old = first; old < Math.min(size, end); old++)
        weights.push(Math.max(0, Math.min(end, old + 1) - Math.max(start, old)) / step);
      return [first, weights];
    }
    const center = Math.min(size - 1, Math.max(0, (place + 0.5) * step - 0.5)), first = Math.floor(center);
    for (let old = first; old < Math.min(size, first + 2); old++) weights.push(1 - Math.abs(center - old));
    return [first, weights];
  });
}

function resize({width, height, values}, newWidth, newHeight) {
  const between = makeInk(width, newHeight), result = makeInk(newWidth, newHeight), across = weigh(width, newWidth);
  weigh(height, newHeight).forEach(([first, weights], y) =>
    weights.forEach((weight, i) => {
      for (let x = 0; x < width; x++) between.values[y * width + x] += weight * values[(first + i) * width + x];
    }));
  for (let y = 0; y < newHeight; y++)
    across.forEach(([first, weights], x) => {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * between.values[y * width + first + i];
      result.values[y * newWidth + x] = sum;
    });
  return result;
}

// Scale so that the longer side is `box`, with the aspect kept
function fit(ink, box) {
  const scale = box / Math.max(ink.width, ink.height);
  return resize(ink, Math.max(1, round(ink.width * scale)), Math.max(1, round(ink.height * scale)));
}

// The mean width of strokes: twice their area by the length of their edges
function strokeWidth({width, height, values}) {
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height ? values[y * width + x] : 0;
  let edges = 0, area = 0;
  for (const value of values) area += value;
  for (let y = 0; y <= height; y++)
    for (let x = 0; x <= width; x++) {
      const a = at(x - 1, y - 1), b = at(x, y - 1), c = at(x - 1, y), d = at(x, y);
      if (a || b || c || d) edges += Math.hypot((c - a + d - b) / 2, (b - a + d - c) / 2);
    }
  return 2 * area / edges;
}

// The maximum of each pixel's surroundings, a disc
function dilate({width, height, values}, radius) {
  const reach = Math.ceil(radius), result = makeInk(width + 2 * reach, height + 2 * reach), disc = [];
  for (let y = -reach; y <= reach; y++)
    for (let x = -reach; x <= reach; x++)
      if (x * x + y * y <= radius * radius) disc.push((reach + y) * result.width + reach + x);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const value = values[y * width + x], place = y * result.width + x;
      if (value) for (const offset of disc) if (result.values[place + offset] < value) result.values[place + offset] = value;
    }
  return result;
}

// Put the centre of mass into the middle; grey levels of 28×28
function center({width, height, values}) {
  let sum = 0, right = 0, down = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const value = values[y * width + x];
      sum += value; right += value * x; down += value * y;
    }
  const corner = (mass, size) => Math.min(SIDE - size, Math.max(0, round(CENTER - mass)));
  const left = corner(right / sum, width), top = corner(down / sum, height), image = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      image[(top + y) * SIDE + left + x] = Math.floor(255 * values[y * width + x] + 0.5);
  return image;
}

// Grey levels of 28×28, ink high, of a drawn digit; null where nothing is drawn
function normalize(ink) {
  const cropped = crop(ink);
  if (!cropped) return null;
  const large = fit(cropped, WORK_BOX), share = STROKE / BOX;
  const radius = (share * WORK_BOX - strokeWidth(large)) / (2 * (1 - share));
  const boxed = fit(radius >= 1 ? crop(dilate(large, radius)) : cropped, BOX);
  const most = boxed.values.reduce((a, b) => Math.max(a, b), 0);
  return center({...boxed, values: boxed.values.map(value => value / most)});
}
