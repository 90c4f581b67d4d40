// From the ink of a drawing to the image that a net sees: the core of mnist_lightning/images/handwriting.py,
// operation by operation.  Ink is a Float64Array in [0, 1], row by row.
"use strict";

const SIDE = 28, BOX = 20, CENTER = 14;

function roundEven(value) {  // as Python and numpy round: halves to even
  const down = Math.floor(value), rest = value - down;
  return rest > 0.5 || (rest === 0.5 && down % 2) ? down + 1 : down;
}

// The rows and columns that hold ink, [top, bottom, left, right], the ends not included; null where it is blank
function findBox(ink, width, height) {
  let top = height, bottom = 0, left = width, right = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (ink[y * width + x] > 0.1) {
        top = Math.min(top, y); bottom = Math.max(bottom, y + 1);
        left = Math.min(left, x); right = Math.max(right, x + 1);
      }
  return bottom ? [top, bottom, left, right] : null;
}

function hamming(x) {
  if (x === 0) return 1;
  return Math.abs(x) >= 1 ? 0 : Math.sin(Math.PI * x) / (Math.PI * x) * (0.54 + 0.46 * Math.cos(Math.PI * x));
}

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// Pillow's resampling along one axis: for each place of the result, where its weights begin, and the weights
function resampling(from, to, filter, support) {
  const scale = from / to, stretch = Math.max(scale, 1);
  return Array.from({length: to}, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - support * stretch + 0.5));
    const end = Math.min(from, Math.floor(center + support * stretch + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(filter((x - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {first, weights: weights.map(weight => weight / sum)};
  });
}

function resize(values, width, height, newWidth, newHeight, filter, support) {
  const across = resampling(width, newWidth, filter, support), down = resampling(height, newHeight, filter, support);
  const between = new Float32Array(newWidth * height), result = new Float32Array(newWidth * newHeight);
  for (let y = 0; y < height; y++)
    across.forEach(({first, weights}, x) => {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * values[y * width + first + i];
      between[y * newWidth + x] = sum;
    });
  down.forEach(({first, weights}, y) => {
    for (let x = 0; x < newWidth; x++) {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += weights[i] * between[(first + i) * newWidth + x];
      result[y * newWidth + x] = sum;
    }
  });
  return result;
}

function quantile(values, share) {
  const sorted = Float64Array.from(values).sort(), place = share * (sorted.length - 1), below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

// Scale to the 20×20 box with its aspect; the darkest stroke becomes 1
function fit(ink, width, height) {
  const scale = BOX / Math.max(width, height);
  const newWidth = Math.max(1, roundEven(width * scale)), newHeight = Math.max(1, roundEven(height * scale));
  const [filter, support] = scale < 1 ? [hamming, 1] : [bicubic, 2];
  const scaled = resize(ink, width, height, newWidth, newHeight, filter, support);
  const darkest = Math.max(quantile(scaled, 0.98), 1e-6);
  return {width: newWidth, height: newHeight, values: scaled.map(v => Math.min(1, Math.max(0, v / darkest)))};
}

// Put the centre of mass into the middle
function center({width, height, values}) {
  let sum = 0, right = 0, down = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const ink = values[y * width + x];
      sum += ink; right += ink * x; down += ink * y;
    }
  const corner = (mass, size) => Math.min(SIDE - size, Math.max(0, roundEven(CENTER - mass)));
  const left = corner(right / sum, width), top = corner(down / sum, height);
  const image = new Uint8Array(SIDE * SIDE);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      image[(top + y) * SIDE + left + x] = roundEven(255 * values[y * width + x]);
  return image;
}

// (H, W) ink in [0, 1] -> 28×28 grey levels, ink high; null where nothing is drawn
function prepare(ink, width, height) {
  const box = findBox(ink, width, height);
  if (!box) return null;
  const [top, bottom, left, right] = box, cut = new Float32Array((bottom - top) * (right - left));
  for (let y = top; y < bottom; y++)
    for (let x = left; x < right; x++)
      cut[(y - top) * (right - left) + x - left] = ink[y * width + x];
  return center(fit(cut, right - left, bottom - top));
}

// For images that are no handwriting: the whole field, each pixel the mean of what it covers
function shrink(ink, width, height, newWidth, newHeight) {
  const triangle = x => Math.max(0, 1 - Math.abs(x));
  return Uint8Array.from(resize(ink, width, height, newWidth, newHeight, triangle, 1), v => roundEven(255 * v));
}
