"use strict";
// Elements and numbers. Texts of models and files become text nodes and attribute values alone, never markup.

const LABELS = {accuracy: "right answer", cross_reference: "cross-reference"};

const byId = (id) => document.getElementById(id);
const label = (name) => LABELS[name] ?? name;
const digits = (value, most = 3) => (value == null ? "–" : value.toLocaleString("en", {maximumFractionDigits: most}));
const short = (value) =>
  Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-2)
    ? value.toExponential(1)
    : String(Number(value.toPrecision(3)));
const signed = (value, most) =>
  `${digits(value, most)}`.match(/[1-9]/) ? `${value < 0 ? "−" : "+"}${digits(Math.abs(value), most)}` : "0";
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function node(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) element.setAttribute(key, value);
  element.append(
    ...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))),
  );
  return element;
}
