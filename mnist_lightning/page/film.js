// The film of a training: weights, answers and losses from one moment to the next.
"use strict";

let film = null;

function makeFilm() {
  const raw = data.film, size = WIDTH * HEIGHT, moments = raw.steps.length, units = raw.units;
  const count = raw.labels.length, classes = data.classes.length;
  film = {
    ...raw, moment: moments - 1, chosen: null,
    weights: cut(bytes(raw.weights), moments * units, size),  // 0 … 255 for -limit … limit
    images: cut(bytes(raw.images), count, size),
    probabilities: cut(bytes(raw.probabilities), moments * count, classes),
    activations: cut(bytes(raw.activations), moments * count, units),
  };
  $("film").hidden = false;
  $("moment").max = moments - 1;
  $("moment").value = moments - 1;
  $("moment").addEventListener("input", () => { film.moment = Number($("moment").value); showMoment(); });
  $("film-images").append(...film.labels.map((label, index) => {
    const button = make("button", {type: "button"}, make("canvas"), make("span"));
    button.addEventListener("click", () => { film.chosen = film.chosen === index ? null : index; showMoment(); });
    return button;
  }));
  let timer = null;
  $("play").addEventListener("click", () => {
    const stop = () => { clearInterval(timer); timer = null; $("play").textContent = "Play"; };
    if (timer !== null) return stop();
    if (film.moment === moments - 1) film.moment = 0;
    $("play").textContent = "Pause";
    timer = setInterval(() => {
      if (film.moment === moments - 1) return stop();
      film.moment += 1;
      showMoment();
    }, 150);
  });
}

function showMoment() {
  const {moment, steps} = film;
  $("moment").value = moment;
  const loss = film.losses.val[moment] ?? film.losses.train[moment];
  $("when").textContent = `step ${steps[moment]} of ${steps[steps.length - 1]}, epoch ${film.epochs[moment].toFixed(1)}, `
    + `loss ${loss.toFixed(3)}`;
  showFilmUnits(); showCurves();
  $("film-images").querySelectorAll("button").forEach((button, index) => {
    const shares = film.probabilities[moment * film.labels.length + index];
    const best = shares.indexOf(Math.max(...shares)), right = best === film.labels[index];
    paint(button.firstChild, film.images[index], WIDTH, HEIGHT);
    const told = `${data.classes[best]} ${Math.round(shares[best] / 2.55)} %`;
    if (button.lastChild.textContent !== told) button.lastChild.textContent = told;
    button.lastChild.className = right ? "" : "wrong";
    button.setAttribute("aria-pressed", film.chosen === index);
  });
}

function showFilmUnits() {
  const columns = Math.min(8, film.units), rows = Math.ceil(film.units / columns), gap = 2;
  const canvas = $("film-units"), across = columns * (WIDTH + gap), down = rows * (HEIGHT + gap);
  canvas.width = across; canvas.height = down;
  const context = canvas.getContext("2d"), tile = make("canvas");
  const lit = film.chosen === null ? null
    : film.activations[film.moment * film.labels.length + film.chosen];
  for (let unit = 0; unit < film.units; unit++) {
    const weights = Array.from(film.weights[film.moment * film.units + unit], level => level - 128);
    paint(tile, weights, WIDTH, HEIGHT, {limit: 127});
    const x = unit % columns * (WIDTH + gap), y = Math.floor(unit / columns) * (HEIGHT + gap);
    if (lit) {
      context.globalAlpha = lit[unit] / 255;
      context.fillStyle = color("lit");
      context.fillRect(x, y, WIDTH + gap, HEIGHT + gap);
      context.globalAlpha = 1;
    }
    context.drawImage(tile, x + gap / 2, y + gap / 2);
  }
}

function showCurves() {
  const canvas = $("film-curves"), context = canvas.getContext("2d"), left = 60, bottom = 40;
  const wide = canvas.width - left - 14, high = canvas.height - bottom - 14, {train, val, batch} = film.losses;
  const all = [...train, ...val, ...batch].filter(loss => loss > 0), logs = all.map(Math.log10);
  const low = Math.floor(Math.min(...logs) * 2) / 2, top = Math.max(...logs) + 0.05, last = film.epochs.at(-1) || 1;
  const place = (epoch, loss) => [
    left + epoch / last * wide, 14 + high * (1 - (Math.log10(Math.max(loss, 1e-9)) - low) / (top - low || 1))];
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = "20px system-ui, sans-serif";
  context.fillStyle = color("soft");
  context.strokeStyle = color("line");
  context.lineWidth = 1;
  for (let power = Math.ceil(low * 2) / 2; power <= top; power += 0.5) {
    const [, y] = place(0, 10 ** power);
    context.beginPath(); context.moveTo(left, y); context.lineTo(canvas.width, y); context.stroke();
    context.fillText(Number((10 ** power).toPrecision(1)), 4, y + 7);
  }
  const every = Math.max(1, Math.ceil(last / 8));
  for (let epoch = 0; epoch <= last; epoch += every)
    context.fillText(epoch, place(epoch, 1)[0] - 6, canvas.height - 12);
  const line = (losses, name, width) => {
    context.strokeStyle = context.fillStyle = color(name);
    context.lineWidth = width;
    context.beginPath();
    losses.forEach((loss, i) => context.lineTo(...place(film.epochs[i], loss)));
    context.stroke();
    if (losses.length) {
      context.beginPath();
      context.arc(...place(film.epochs[film.moment], losses[film.moment]), 3 * width, 0, 2 * Math.PI);
      context.fill();
    }
  };
  line(batch, "soft", 1); line(train, "for", 3); line(val, "against", 3);
}
