// The net: forward, and backward for what speaks for an answer.
"use strict";

const ACTIVATIONS = {  // [value, slope]
  relu: [z => Math.max(0, z), z => +(z > 0)],
  leaky_relu: [z => z > 0 ? z : 0.01 * z, z => z > 0 ? 1 : 0.01],
  elu: [z => z > 0 ? z : Math.expm1(z), z => z > 0 ? 1 : Math.exp(z)],
  tanh: [Math.tanh, z => 1 - Math.tanh(z) ** 2],
  gelu: [z => z * normal(z), z => normal(z) + z * Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI)],
  none: [z => z, () => 1],
};

function normal(z) {  // the normal distribution; Abramowitz and Stegun 7.1.26, to 1e-7
  const t = 1 / (1 + 0.3275911 * Math.abs(z) / Math.SQRT2);
  const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const below = tail * Math.exp(-z * z / 2) / 2;
  return z < 0 ? below : 1 - below;
}

function bytes(text) { return Uint8Array.from(atob(text), letter => letter.charCodeAt(0)); }
function floats(text) { return new Float32Array(bytes(text).buffer); }

function readNet(data) {
  const layers = data.layers.map(layer => ({
    ...layer,
    weights: new Int8Array(bytes(layer.weights).buffer), scales: floats(layer.scales), biases: floats(layer.biases),
    norm: layer.norm && {gains: floats(layer.norm.gains), shifts: floats(layer.norm.shifts), eps: layer.norm.eps},
  }));
  const exact = layers.every(layer => !layer.norm && ["relu", "leaky_relu", "none"].includes(layer.activation));
  const net = {layers, exact};
  net.blank = forward(net, new Float32Array(layers[0].inputs));
  return net;
}

// Pixels in [0, 1] -> what each layer takes, its sums before the activation, and its values
function forward(net, pixels) {
  const passes = [];
  let inputs = pixels;
  for (const layer of net.layers) {
    const sums = new Float64Array(layer.outputs), on = [];
    for (let i = 0; i < layer.inputs; i++) if (inputs[i] !== 0) on.push(i);
    for (let j = 0; j < layer.outputs; j++) {
      const row = j * layer.inputs;
      let sum = 0;
      for (let n = 0; n < on.length; n++) sum += layer.weights[row + on[n]] * inputs[on[n]];
      sums[j] = sum * layer.scales[j] + layer.biases[j];
    }
    let std = 1, normed = sums, before = sums;
    if (layer.norm) {
      const mean = sums.reduce((a, b) => a + b, 0) / sums.length;
      std = Math.sqrt(sums.reduce((a, b) => a + (b - mean) ** 2, 0) / sums.length + layer.norm.eps);
      normed = sums.map(sum => (sum - mean) / std);
      before = normed.map((value, j) => value * layer.norm.gains[j] + layer.norm.shifts[j]);
    }
    const values = before.map(ACTIVATIONS[layer.activation][0]);
    passes.push({inputs, std, normed, before, values});
    inputs = values;
  }
  return passes;
}

// What a value of a layer gains from each value that goes into the layer `down`, for a gain of `factors` each.
//
// Of a net of bends (ReLU) the slope of a unit is that of the line through its values for the blank image and
// for this one, so that all gains sum to the difference between the two: DeepLIFT's rescale rule, Shrikumar,
// Greenside and Kundaje 2017, arXiv 1704.02685.  Of other nets it is the slope at this image: the gradient.
function backward(net, passes, top, factors, down = 0, ends = true) {
  for (let number = top; number >= down; number--) {
    const layer = net.layers[number], pass = passes[number], blank = net.blank[number];
    const [value, slope] = ACTIVATIONS[layer.activation];
    let gains = factors.map((factor, j) => {
      if (ends && number === top) return factor;  // of the sum before the activation
      const moved = pass.before[j] - blank.before[j];
      return factor * (net.exact && Math.abs(moved) > 1e-6
        ? (value(pass.before[j]) - value(blank.before[j])) / moved : slope(pass.before[j]));
    });
    if (layer.norm) {
      const each = gains.map((gain, j) => gain * layer.norm.gains[j]);
      const mean = each.reduce((a, b) => a + b, 0) / each.length;
      const along = each.reduce((a, b, j) => a + b * pass.normed[j], 0) / each.length;
      gains = each.map((gain, j) => (gain - mean - along * pass.normed[j]) / pass.std);
    }
    factors = new Float64Array(layer.inputs);
    for (let j = 0; j < layer.outputs; j++) {
      const gain = gains[j] * layer.scales[j], row = j * layer.inputs;
      if (gain !== 0) for (let i = 0; i < layer.inputs; i++) factors[i] += gain * layer.weights[row + i];
    }
  }
  return factors;
}

function only(size, index) { return Float64Array.from({length: size}, (_, i) => +(i === index)); }

// Bytes in which a 0 is followed by how many there are
function spread(packed, size) {
  const all = new Uint8Array(size);
  for (let i = 0, place = 0; i < packed.length; i++)
    if (packed[i]) all[place++] = packed[i]; else place += packed[++i];
  return all;
}

function softmax(logits, temperature) {
  const most = Math.max(...logits), powers = Array.from(logits, z => Math.exp((z - most) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}

// How far an image is from what its class looks like, as a share of the limit: mnist_lightning/evaluation/likeness.py
function distanceTo(likeness, label, probability, grey, width, hidden) {
  const {pool, scales, doubt, limit, rows, steps} = likeness, features = new Float64Array(likeness.features);
  const units = Math.min(likeness.units, hidden.length), across = Math.floor(width / pool), pixels = features.length - units;
  grey.forEach((level, place) => {
    const x = Math.floor(place % width / pool), at = Math.floor(place / width / pool) * across + x;
    if (x < across && at < pixels) features[at] += scales[0] * level / pool ** 2;
  });
  hidden.forEach((value, unit) => {
    const sign = Math.floor(unit / units) % 2 ? -1 : 1;
    features[pixels + unit % units] += sign * scales[1] * value;
  });
  const count = rows.length / features.length / data.classes.length, first = label * count;
  const row = number => features.map((_, i) => steps[number] * rows[number * features.length + i]), mean = row(first);
  const offsets = features.map((value, i) => value - mean[i]), dot = other => offsets.reduce((sum, z, i) => sum + z * other[i], 0);
  let left = dot(offsets);
  for (let number = first + 1; number < first + count; number++) left -= dot(row(number)) ** 2;
  return (left - doubt * Math.log(Math.max(probability, 1e-12))) / limit;
}

// An image set upright, as mnist_lightning/images/deform.py does it
function upright(image, width, height) {
  let ink = 0, right = 0, down = 0, xy = 0, yy = 0;
  for (let row = 0; row < height; row++)
    for (let column = 0; column < width; column++) {
      const value = image[row * width + column], x = column - (width - 1) / 2, y = row - (height - 1) / 2;
      ink += value; right += value * x; down += value * y; xy += value * x * y; yy += value * y * y;
    }
  ink = Math.max(ink, 1e-6); right /= ink; down /= ink;
  const lean = (xy / ink - right * down) / Math.max(yy / ink - down * down, 1e-6);
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height ? image[y * width + x] : 0;
  return Float32Array.from({length: width * height}, (_, place) => {
    const y = Math.floor(place / width) - (height - 1) / 2, x = place % width - (width - 1) / 2;
    const fromX = lean * y + right + x + (width - 1) / 2, fromY = y + down + (height - 1) / 2;
    const left = Math.floor(fromX), top = Math.floor(fromY), a = fromX - left, b = fromY - top;
    return (1 - b) * ((1 - a) * at(left, top) + a * at(left + 1, top))
      + b * ((1 - a) * at(left, top + 1) + a * at(left + 1, top + 1));
  });
}
