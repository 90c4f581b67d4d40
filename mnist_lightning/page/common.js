// What the pages share: their data, elements, colours.
"use strict";

const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);

function make(kind, {text = "", ...rest} = {}, ...children) {
  const element = Object.assign(document.createElement(kind), rest);
  element.append(...(text ? [text] : []), ...children);
  return element;
}

function color(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }
