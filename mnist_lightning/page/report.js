// The page of a report: tables to sort, curves to point at, parameters, the best nets.
"use strict";

const QUIET = 0.05;  // the share of values at the worse end that may lie beyond an axis
const MOST_VALUES = 8;  // of a number with more of them, ranges are the rows of a table of two
const RANGES = 5;
const SVG = "http://www.w3.org/2000/svg";
let picked = null;  // the numbers of the runs that are shown before the others; null: all alike

function draw(kind, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function shorten(text, most) { return text.length <= most ? text : `${text.slice(0, most - 1)}…`; }

function show(value, metric = data.metric) {
  return metric.endsWith("acc") ? `${(100 * value).toFixed(2)} %` : value.toFixed(4);
}

// Numbers in their order, also where they are written as texts, and before words
function compare(a, b) {
  const [x, y] = [a, b].map(one => String(one).trim() === "" ? NaN : Number(one));
  if (Number.isNaN(x) || Number.isNaN(y))
    return Number.isNaN(x) - Number.isNaN(y) || String(a).localeCompare(String(b), undefined, {numeric: true});
  return x - y;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// ---- tables

// Cells are texts, or [number, text], or null. Rows stand for runs.
function makeTable({columns, rows}, pickable) {
  const body = make("tbody"), heads = [];
  const keyOf = cell => Array.isArray(cell) ? cell[0] : cell === null || cell === "" ? null : cell;
  const elements = rows.map(({cells, runs}) => {
    const row = make("tr", {}, ...cells.map((cell, column) => make("td", {
      text: Array.isArray(cell) ? cell[1] : cell ?? "–",
      className: Array.isArray(cell) ? "number" : String(cell).length < 36 ? "short" : ""})));
    if (pickable && runs.length) {
      row.tabIndex = 0;
      row.runs = runs;
      row.addEventListener("click", () => pick(row.getAttribute("aria-selected") === "true" ? null : runs));
      row.addEventListener("keydown", event => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); row.click(); }
      });
    }
    return row;
  });
  let sorted = null, up = true;
  const order = column => {
    up = sorted === column ? !up : true;
    sorted = column;
    const places = rows.map((_, i) => i).sort((i, j) => {
      const a = keyOf(rows[i].cells[column]), b = keyOf(rows[j].cells[column]);
      return a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * compare(a, b);
    });
    body.append(...places.map(place => elements[place]));
    heads.forEach((head, i) =>
      head.setAttribute("aria-sort", i !== column ? "none" : up ? "ascending" : "descending"));
    heads.forEach((head, i) => { head.lastChild.lastChild.textContent = i !== column ? "" : up ? " ↑" : " ↓"; });
  };
  columns.forEach((name, column) => {
    const button = make("button", {type: "button", title: name}, make("span", {text: shorten(name, 24)}), make("span"));
    button.addEventListener("click", () => order(column));
    const isNumber = rows.some(({cells}) => Array.isArray(cells[column]));
    heads.push(make("th", {scope: "col", className: isNumber ? "number" : ""}, button));
  });
  body.append(...elements);
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
}

function fill(name, table, pickable) {
  if (!table || !table.rows.length) return;
  $(name).hidden = false;
  $(name).querySelector(".scroll").append(makeTable(table, pickable));
}

// Show some runs before the others, everywhere
function pick(runs) {
  picked = runs && new Set(runs);
  document.querySelectorAll("tr[tabindex]").forEach(row =>
    row.setAttribute("aria-selected", Boolean(picked && row.runs.every(run => picked.has(run)))));
  emphasize(picked);
}

function emphasize(runs) {
  document.querySelectorAll(".charts svg, .chart svg").forEach(svg => svg.classList.toggle("picked", Boolean(runs)));
  document.querySelectorAll("[data-run]").forEach(one =>
    one.classList.toggle("hot", Boolean(runs?.has(Number(one.dataset.run)))));
}

function tell(text, x, y) {
  const tip = $("tip");
  tip.hidden = !text;
  if (!text) return;
  if (tip.textContent !== text) tip.textContent = text;
  const left = Math.max(8, Math.min(x + 14, scrollX + innerWidth - tip.offsetWidth - 12));
  tip.style.left = `${left}px`;
  tip.style.top = `${y - scrollY + tip.offsetHeight + 20 < innerHeight ? y + 14 : y - tip.offsetHeight - 10}px`;
}

// ---- axes

// The ends of an axis that has all of these values, or all but the outliers at its worse end
function limits(values, worse, {all = false} = {}) {
  const sorted = [...values].sort((a, b) => a - b), skipped = all ? 0 : Math.floor(QUIET * sorted.length);
  let low = sorted[worse === "low" ? skipped : 0], high = sorted[sorted.length - 1 - (worse === "high" ? skipped : 0)];
  if (low === high) { low -= Math.abs(low) / 20 || 0.5; high += Math.abs(high) / 20 || 0.5; }
  return [low, high];
}

function ticksOf([low, high], log, most) {
  if (log && high / low >= 10) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of high / low > 1000 ? [1] : [1, 3]) all.push(factor * 10 ** power);
    return all.filter(tick => tick >= low * 0.999 && tick <= high * 1.001);
  }
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(factor => factor * power >= raw) * power, ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

function axis([low, high], from, to, {log = false} = {}) {
  const place = log ? Math.log : value => value, a = place(low), b = place(high);
  const at = value => from + (place(value) - a) / (b - a) * (to - from);
  return Object.assign(at, {low, high, log, from, to});
}

function number(value) { return String(Number(value.toPrecision(6))); }

// A number on a metric's axis, with as many digits as its neighbours need
function labels(ticks, metric) {
  const scale = metric.endsWith("acc") ? 100 : 1;
  const step = ticks.length > 1 ? Math.min(...ticks.slice(1).map((tick, i) => tick - ticks[i])) * scale : 1;
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  return ticks.map(tick => (scale * tick).toFixed(digits));
}

// An empty chart as wide as its place: lines of a grid, numbers, what the axes are
function makeChart(host, {height, x, y, xTitle, yTitle, xTicks, yTicks, left, bottom = 40}) {
  const width = Math.max(240, host.clientWidth), svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, height});
  const X = x(left, width - 14), Y = y(height - bottom, 26);
  for (const [value, text] of yTicks(Y, 5)) {
    svg.append(draw("line", {class: "grid", x1: left, x2: width - 14, y1: Y(value), y2: Y(value)}));
    svg.append(draw("text", {x: left - 6, y: Y(value) + 4, "text-anchor": "end"}, text));
  }
  for (const [value, text] of xTicks(X, Math.max(4, width / 90))) {
    svg.append(draw("line", {class: "grid", x1: X(value), x2: X(value), y1: 26, y2: height - bottom}));
    svg.append(draw("text", {x: X(value), y: height - bottom + 16, "text-anchor": "middle"}, text));
  }
  svg.append(draw("text", {x: (left + width - 14) / 2, y: height - 4, "text-anchor": "middle"}, xTitle));
  svg.append(draw("text", {class: "title", x: 0, y: 14}, yTitle));
  return {svg, X, Y, width};
}

// ---- learning curves

let lines = [], hovered = null;

function showCurves() {
  const section = $("curves"), host = section.querySelector(".chart"), metric = section.querySelector("select").value;
  const wanted = Object.fromEntries([...section.querySelectorAll("input")].map(box => [box.value, box.checked]));
  lines = (data.curves[metric] ?? []).filter(line => wanted[line.split]);
  host.replaceChildren();
  if (!lines.length) return;
  const log = !metric.endsWith("acc") && lines.every(line => line.values.every(value => value > 0));
  const worse = log ? "high" : "low", values = lines.flatMap(line => line.values);
  const across = [Math.min(...lines.map(line => line.epochs[0])), Math.max(...lines.map(line => line.epochs.at(-1)))];
  if (across[0] === across[1]) { across[0] -= 0.5; across[1] += 0.5; }
  const {svg, X, Y} = makeChart(host, {
    height: Math.min(420, Math.max(280, host.clientWidth * 0.55)), left: 58,
    x: (from, to) => axis(across, from, to),
    y: (from, to) => axis(limits(values, worse, {all: wanted.all}), from, to, {log}),
    xTicks: (X, most) => ticksOf([X.low, X.high], false, Math.min(10, most)).filter(Number.isInteger).map(t => [t, t]),
    yTicks: (Y, most) => {
      const ticks = ticksOf([Y.low, Y.high], log, most);
      const texts = log ? ticks.map(number) : labels(ticks, metric);
      return ticks.map((tick, i) => [tick, texts[i]]);
    },
    xTitle: "epoch", yTitle: metric + (metric.endsWith("acc") ? " (%)" : ""),
  });
  const clip = draw("clipPath", {id: "inside"});
  clip.append(draw("rect", {x: X.from - 2, y: Y.to - 2, width: X.to - X.from + 4, height: Y.from - Y.to + 4}));
  const group = draw("g", {"clip-path": "url(#inside)"});
  for (const line of lines) {
    line.points = line.values.map((value, i) => [X(line.epochs[i]), Y(value)]);
    const points = line.points.map(point => point.map(place => place.toFixed(1)).join()).join(" ");
    const alone = line.points.length === 1 ? {"stroke-linecap": "round", "stroke-width": 6} : {};
    group.append(draw("polyline", {
      class: `line ${line.split}`, "data-run": line.run, ...alone,
      points: line.points.length === 1 ? `${points} ${points}` : points}));
  }
  const mark = draw("circle", {r: 5, fill: "none", stroke: "currentColor", "stroke-width": 2, visibility: "hidden"});
  svg.append(clip, group, mark);
  Object.assign(svg, {mark});
  svg.setAttribute("tabindex", 0);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${metric} by epoch of ${new Set(lines.map(line => line.run)).size} runs`);
  svg.addEventListener("pointermove", event => hoverAt(svg, event));
  svg.addEventListener("pointerdown", event => hoverAt(svg, event));
  for (const kind of ["pointerleave", "blur"]) svg.addEventListener(kind, () => leave(svg));
  svg.addEventListener("keydown", event => moveAlong(svg, event));
  host.append(svg);
  emphasize(picked);
}

function hoverAt(svg, event) {
  const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  let best = null, least = 60;
  for (const line of lines) {
    if (picked && !picked.has(line.run)) continue;
    line.points.forEach(([a, b], i) => {
      const away = Math.hypot(a - x, b - y);
      if (away < least) { least = away; best = [line, i]; }
    });
  }
  best ? hover(svg, ...best) : leave(svg);
}

function hover(svg, line, i) {
  hovered = [line, i];
  const [x, y] = line.points[i], box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
  for (const [name, value] of [["cx", x], ["cy", y], ["visibility", "visible"]]) svg.mark.setAttribute(name, value);
  const metric = $("curves").querySelector("select").value, epoch = line.epochs[i];
  const told = lines.filter(other => other.run === line.run && other.epochs.includes(epoch)).map(other =>
    `${other.split === "val" ? "validation" : "training"} ${show(other.values[other.epochs.indexOf(epoch)], metric)}`);
  emphasize(new Set([line.run]));
  tell(`${data.runs[line.run].name}\nepoch ${epoch}: ${told.join(", ")}`,
    box.left + scrollX + x * scale, box.top + scrollY + y * scale);
}

function leave(svg) {
  hovered = null;
  svg.mark.setAttribute("visibility", "hidden");
  tell("");
  emphasize(picked);
}

function moveAlong(svg, event) {
  const steps = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
  if (!steps) return;
  event.preventDefault();
  const shown = lines.filter(line => !picked || picked.has(line.run));
  const [line, i] = hovered ?? [shown[0], 0];
  const next = shown[Math.max(0, Math.min(shown.length - 1, shown.indexOf(line) + (hovered ? steps[0] : 0)))];
  hover(svg, next, Math.max(0, Math.min(next.values.length - 1, i + (hovered ? steps[1] : 0))));
}

function makeCurves() {
  const names = Object.keys(data.curves);
  if (!names.length) return;
  const section = $("curves");
  section.hidden = false;
  section.querySelector("select").append(...names.map(name => make("option", {text: name})));
  section.querySelectorAll("select, input").forEach(one => one.addEventListener("change", showCurves));
  for (const line of Object.values(data.curves).flat()) line.epochs ??= line.values.map((_, i) => i + 1);
}

// ---- each parameter, and two

function asNumbers(values) {
  const numbers = values.map(value => value.trim() === "" ? NaN : Number(value));
  return numbers.every(Number.isFinite) && new Set(numbers).size > 2 ? numbers : null;
}

function isLog(numbers) {
  const low = Math.min(...numbers), high = Math.max(...numbers);
  return low > 0 && high / low >= 10;
}

function showParameters() {
  const ranked = data.runs.map((run, i) => ({...run, i})).filter(run => run.value !== null);
  $("parameters").hidden = !data.parameters.length || !ranked.length;
  const host = $("parameters").querySelector(".charts");
  host.replaceChildren();
  for (const name of data.parameters) {
    const cell = make("div");
    host.append(cell);
    cell.append(drawParameter(cell, name, ranked));
  }
  emphasize(picked);
}

function drawParameter(host, name, ranked) {
  const values = ranked.map(run => run.value), texts = ranked.map(run => run.parameters[name]);
  const worse = data.maximize ? "low" : "high", ends = limits(values, worse), numbers = asNumbers(texts);
  const metricTicks = (axis, most) => {
    const ticks = ticksOf([axis.low, axis.high], false, most), texts = labels(ticks, data.metric);
    return ticks.map((tick, i) => [tick, texts[i]]);
  };
  const title = data.metric + (data.metric.endsWith("acc") ? " (%)" : ""), heading = `${title} by ${name}`;
  const inside = value => Math.max(ends[0], Math.min(ends[1], value));
  let chart, place, mark;
  if (numbers) {  // along the bottom
    const log = isLog(numbers), across = limits(numbers, "none", {all: true});
    chart = makeChart(host, {
      height: 240, left: 52, xTitle: name, yTitle: heading,
      x: (from, to) => axis(across, from + 8, to - 8, {log}), y: (from, to) => axis(ends, from - 6, to + 6),
      xTicks: (X, most) => ticksOf([X.low, X.high], log, most).map(tick => [tick, number(tick)]), yTicks: metricTicks,
    });
    place = i => [chart.X(numbers[i]), chart.Y(inside(values[i]))];
    mark = (i, y) => ({x1: place(i)[0] - 7, x2: place(i)[0] + 7, y1: chart.Y(y), y2: chart.Y(y)});
  } else {  // words: a row each
    const rows = [...new Set(texts)].sort(compare);
    const longest = Math.min(22, Math.max(...rows.map(row => row.length)));
    chart = makeChart(host, {
      height: 80 + 28 * rows.length, left: 16 + 6.6 * longest, xTitle: title, yTitle: heading,
      x: (from, to) => axis(ends, from + 8, to - 8), y: (from, to) => axis([-0.5, rows.length - 0.5], to, from),
      xTicks: (X, most) => metricTicks(X, Math.min(5, most)),
      yTicks: () => rows.map((row, i) => [i, shorten(row, 22)]),
    });
    place = i => [chart.X(inside(values[i])), chart.Y(rows.indexOf(texts[i]))];
    mark = (i, y) => ({x1: chart.X(y), x2: chart.X(y), y1: place(i)[1] - 9, y2: place(i)[1] + 9});
  }
  const groups = new Map();
  texts.forEach((text, i) => groups.set(text, [...groups.get(text) ?? [], i]));
  for (const members of groups.values())
    if (members.length > 1)
      chart.svg.append(draw("line", {class: "median", ...mark(members[0], inside(median(members.map(i => values[i]))))}));
  const aside = i => {  // so that dots don't hide each other
    const members = groups.get(texts[i]);
    return (members.indexOf(i) % 5 - Math.min(4, members.length - 1) / 2) * 3;
  };
  ranked.forEach((run, i) => {
    const [x, y] = place(i), [cx, cy] = numbers ? [x + aside(i), y] : [x, y + aside(i)], beyond = inside(values[i]) !== values[i];
    const dot = draw("circle", {class: beyond ? "dot beyond" : "dot", cx, cy, r: 4.5, "data-run": run.i});
    for (const kind of ["pointerenter", "pointerdown"])
      dot.addEventListener(kind, event => {
        emphasize(new Set([run.i]));
        tell(`${run.name}\n${data.metric} ${show(run.value)}`, event.pageX, event.pageY);
      });
    dot.addEventListener("pointerleave", () => { tell(""); emphasize(picked); });
    chart.svg.append(dot);
  });
  chart.svg.setAttribute("role", "img");
  chart.svg.setAttribute("aria-label", `${data.metric} of ${ranked.length} runs by ${name}`);
  return chart.svg;
}

// The rows of a table for a parameter: its values, or ranges of them
function binsOf(texts) {
  const numbers = asNumbers(texts), distinct = [...new Set(texts)];
  if (!numbers || distinct.length <= MOST_VALUES) {
    const names = distinct.sort(compare);
    return {names, of: texts.map(text => names.indexOf(text))};
  }
  const place = isLog(numbers) ? Math.log10 : value => value, back = isLog(numbers) ? value => 10 ** value : value => value;
  const low = place(Math.min(...numbers)), high = place(Math.max(...numbers)), step = (high - low) / RANGES;
  const end = i => Number(back(low + i * step).toPrecision(2));
  return {
    names: Array.from({length: RANGES}, (_, i) => `${end(i)} to ${end(i + 1)}`),
    of: numbers.map(value => Math.min(RANGES - 1, Math.floor((place(value) - low) / step))),
  };
}

function showPair() {
  const [rowName, columnName] = [...$("pairs").querySelectorAll("select")].map(select => select.value);
  const ranked = data.runs.filter(run => run.value !== null);
  const rows = binsOf(ranked.map(run => run.parameters[rowName]));
  const columns = binsOf(ranked.map(run => run.parameters[columnName]));
  const cells = rows.names.map(() => columns.names.map(() => []));
  ranked.forEach((run, i) => cells[rows.of[i]][columns.of[i]].push(run.value));
  const means = cells.map(row => row.map(values => values.length ? values.reduce((a, b) => a + b) / values.length : null));
  const [low, high] = limits(means.flat().filter(mean => mean !== null), data.maximize ? "low" : "high");
  const head = make("tr", {}, make("th", {text: `${rowName} \\ ${columnName}`}),
    ...columns.names.map(name => make("th", {scope: "col", text: shorten(name, 22), title: name})));
  const body = rows.names.map((name, r) => make("tr", {}, make("th", {scope: "row", text: shorten(name, 22), title: name}),
    ...means[r].map((mean, c) => {
      const cell = make("td", {text: mean === null ? "–" : show(mean)});
      if (mean === null) return cell;
      const share = Math.max(0, Math.min(1, (mean - low) / (high - low))), good = data.maximize ? share : 1 - share;
      cell.title = `mean of ${cells[r][c].length} run${cells[r][c].length > 1 ? "s" : ""}`;
      cell.style.background = `color-mix(in srgb, var(--for) ${Math.round(55 * good)}%, var(--card))`;
      return cell;
    })));
  $("pairs").querySelector(".scroll").replaceChildren(
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function makePairs() {
  const names = data.parameters, selects = [...$("pairs").querySelectorAll("select")];
  if (names.length < 2 || data.runs.every(run => run.value === null)) return;
  $("pairs").hidden = false;
  selects.forEach((select, i) => {
    select.append(...names.map(name => make("option", {text: name})));
    select.value = names[i];
    select.addEventListener("change", showPair);
  });
  showPair();
}

// ---- importance, nets, commands

function makeImportance() {
  if (!data.importance) return;
  $("importance").hidden = false;
  $("importance").querySelector(".note").textContent = data.importance.words;
  $("importance").querySelector("ol").append(...data.importance.rows.map(([name, share, told, isLuck]) => {
    const bar = make("i");
    bar.style.width = `${100 * share}%`;
    const text = `${Math.round(100 * share)} %${told ? `, ${told}` : ""}`;
    return make("li", {className: isLuck ? "luck" : ""}, make("span", {text: name}), make("span", {}, bar),
      make("span", {text}));
  }));
}

function makeNet(net) {
  const table = make("table", {className: "confusion"}), most = Math.max(1, ...net.confusion.flatMap((row, i) =>
    row.filter((_, j) => i !== j)));
  table.append(make("caption", {className: "note", text: "rows: label, columns: read as"}));
  table.append(make("tr", {}, make("th"), ...net.classes.map(name => make("th", {text: shorten(name, 8), title: name}))));
  net.confusion.forEach((row, i) => table.append(make("tr", {}, make("th", {text: shorten(net.classes[i], 8), title: net.classes[i]}),
    ...row.map((count, j) => {
      const cell = make("td", {text: count ? String(count) : "", className: i === j ? "right" : ""});
      cell.title = `${net.classes[i]} read as ${net.classes[j]}: ${count}`;
      if (i !== j && count)
        cell.style.background = `color-mix(in srgb, var(--against) ${Math.round(15 + 50 * count / most)}%, var(--card))`;
      return cell;
    }))));
  const pictures = net.mistakes.map(one => {
    const told = `${one.label} read as ${one.answer}`;
    return make("figure", {}, make("img", {src: `data:image/png;base64,${one.image}`, alt: told}),
      make("figcaption", {}, `${one.label} → ${one.answer}`, make("br"), `${Math.floor(100 * one.probability)}\u00a0%`));
  });
  return make("div", {}, make("h3", {text: net.name}), make("p", {className: "note", text: net.told}),
    make("div", {className: "net"}, net.classes.length ? make("div", {className: "scroll"}, table) : "",
      make("div", {className: "mistakes"}, ...pictures)));
}

function start() {
  $("about").textContent = data.about;
  $("explained").textContent = data.explained;
  fill("settings", data.tables.settings, true);
  fill("folds", data.tables.folds, false);
  fill("runs", data.tables.runs, true);
  makeImportance(); makeCurves(); makePairs();
  $("nets").hidden = !data.nets.length;
  $("nets").querySelector(".nets").append(...data.nets.map(makeNet));
  $("commands").hidden = !data.commands.length;
  $("commands").querySelector("dl").append(...data.commands.flatMap(([told, command]) =>
    [make("dt", {text: told}), make("dd", {}, make("code", {text: command}))]));
  const all = () => { showCurves(); showParameters(); };
  all();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; all(); } });
}
