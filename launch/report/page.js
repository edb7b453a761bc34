"use strict";
// Draws the charts of #data in the reader's colours, and keeps the page of a running run fresh.

const charts = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The parts of a layout that depend on the reader: colours, and room on a phone. */
function theme(chart) {
  const axis = { gridcolor: color("--grid"), linecolor: color("--line"), zeroline: false, tickcolor: color("--line") };
  const shapes = chart.layout.shapes.map((shape) => {
    const own = shape.line && shape.line.color;
    return own || shape.fillcolor ? shape : { ...shape, line: { ...shape.line, color: color("--quiet") },
      label: { ...shape.label, font: { ...shape.label.font, color: color("--quiet") } } };
  });
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    margin: { l: 10, r: 10, t: 10, b: 10 },
    hovermode: "x unified",
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",  // a finger scrolls the page
    ...chart.layout,
    height: (chart.layout.height || 340) + (narrow.matches ? 18 * Math.min(chart.traces.length, 10) : 0),  // the legend
    shapes,
    xaxis: { ...axis, ...chart.layout.xaxis },
    yaxis: { ...axis, ...chart.layout.yaxis, title: { ...chart.layout.yaxis.title, standoff: narrow.matches ? 4 : 10 } },
  };
}

function draw(place) {
  const chart = charts[place.dataset.chart];
  Plotly.react(place, chart.traces, theme(chart), { displaylogo: false, displayModeBar: false });
}

function drawAll() {
  document.querySelectorAll("[data-chart]").forEach(draw);
}

/** Let the reader choose what the x axis is; the choice survives a reload. */
function offerChoices(bar) {
  const chart = charts[bar.dataset.of];
  const place = document.querySelector(`[data-chart="${bar.dataset.of}"]`);
  const buttons = [...bar.querySelectorAll("button")];
  const choose = (name) => {
    chart.layout.xaxis = { ...chart.layout.xaxis, title: { text: chart.choices[name] } };
    chart.traces.forEach((trace) => { trace.x = trace.xs[name]; });
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.x === name));
    remember(`x-${bar.dataset.of}`, name);
    if (place.data) draw(place);
  };
  buttons.forEach((button) => button.addEventListener("click", () => choose(button.dataset.x)));
  const before = recall(`x-${bar.dataset.of}`);
  choose(before in chart.choices ? before : Object.keys(chart.choices)[0]);
}

// A browser may refuse storage to a page that is a file; then nothing is remembered.
function remember(key, value) { try { sessionStorage.setItem(key, value); } catch { /* not remembered */ } }
function recall(key) { try { return sessionStorage.getItem(key); } catch { return null; } }

/** Say how old the page is; while the run goes on, look for the next one. */
function keepFresh() {
  const { written, reload } = document.body.dataset;
  const box = document.getElementById("reload");
  if (!box) return;
  box.checked = recall("reload") !== "off";
  box.addEventListener("change", () => remember("reload", box.checked ? "on" : "off"));
  const tell = () => {
    const minutes = Math.floor((Date.now() / 1e3 - written) / 60);
    if (minutes >= 2) document.getElementById("age").textContent =
      `, ${minutes < 120 ? `${minutes} minutes` : `${Math.floor(minutes / 60)} hours`} ago. A run writes its page at each `
      + "validation; if one is overdue, the run was killed";
  };
  tell();
  setInterval(() => {
    tell();
    if (box.checked && !document.hidden) location.reload();
  }, 1e3 * reload);
}

document.querySelectorAll(".choices").forEach(offerChoices);
// In the next frame: a chart that is drawn changes its own height, which the observer must not see in this one.
const resized = new ResizeObserver((entries) => requestAnimationFrame(() => entries.forEach(({ target, contentRect }) => {
  if (target.drawnWidth !== contentRect.width) draw(target);
  target.drawnWidth = contentRect.width;
})));
document.querySelectorAll("[data-chart]").forEach((place) => resized.observe(place));  // draws each for the first time
dark.addEventListener("change", drawAll);
keepFresh();
