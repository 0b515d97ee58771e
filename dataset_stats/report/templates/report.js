"use strict";
const root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

// Charts: plotly.js is unpacked once; its colours are the page's, so a change of theme redraws.
const charts = JSON.parse(document.getElementById("chart-data").textContent);
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function axis(title, extra) {
  return { title: { text: title, standoff: 8 }, gridcolor: colour("--rule"), zerolinecolor: colour("--rule"),
    linecolor: colour("--rule"), automargin: true, ...extra };
}

const layout = () => ({
  font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 13 },
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 54, r: 16, t: 22, b: 44 },
  hoverlabel: { font: { size: 13 } },
});
const options = { responsive: true, displaylogo: false, displayModeBar: false };

// A long name keeps its beginning and its end, by which names of sets differ.
const short = (text, most = 24) => [...text].length <= most ? text : `${[...text].slice(0, most / 2).join("")}…${[...text].slice(1 - most / 2).join("")}`;

function drawBars(chart) {
  document.getElementById(chart.id).style.height = `${Math.max(320, 26 * chart.names.length)}px`;
  const trace = {
    type: "bar", orientation: "h", x: chart.values, y: chart.names, hovertemplate: "%{y}: %{x:.1%}<extra></extra>",
    marker: { color: chart.is_paper.map((isPaper) => colour(isPaper ? "--soft" : "--accent")), opacity: chart.is_paper.map((isPaper) => isPaper ? 0.45 : 1) },
  };
  const ends = chart.values.map((value, index) => value + (chart.errors[index] || 0));
  const annotations = ends.map((x, index) => ({ x, y: chart.names[index], xanchor: "left", xshift: 4, showarrow: false,
    text: `${(100 * chart.values[index]).toFixed(1)}%` }));
  const shapes = chart.errors.flatMap((error, index) => error ? [{ type: "line", y0: chart.names[index], y1: chart.names[index],
    x0: Math.max(chart.values[index] - error, 0), x1: ends[index], line: { color: colour("--ink"), width: 1.4 } }] : []);
  const top = Math.max(...ends, 0.01) * 1.4;
  Plotly.react(chart.id, [trace], {
    ...layout(), margin: { l: 20, r: 40, t: 8, b: 30 }, bargap: 0.35, annotations, shapes,
    xaxis: axis("", { tickformat: ".0%", range: [0, top], nticks: 5 }), yaxis: axis("", { autorange: "reversed", ticksuffix: "  ", showgrid: false, tickvals: chart.names, ticktext: chart.names.map((name) => short(name)) }),
  }, options);
}

// A histogram as steps: sets lie over each other and stay comparable, which filled bars would not.
function stepTrace(trace, chart) {
  const x = [], y = [];
  trace.x.forEach((middle, index) => {
    x.push(middle - chart.width / 2, middle + chart.width / 2);
    y.push(trace.y[index], trace.y[index]);
  });
  const labels = trace.x.flatMap((middle) => chart.width === 1 ? [middle, middle] : Array(2).fill(`${Math.ceil(middle - chart.width / 2)}–${Math.floor(middle + chart.width / 2)}`));
  return { name: trace.name, x: [x[0], ...x, x[x.length - 1]], y: [0, ...y, 0], text: [labels[0], ...labels, labels[labels.length - 1]] };
}

function draw(chart) {
  if (chart.kind === "bars") { drawBars(chart); return; }
  const series = colour("--series").split(",").map((text) => text.trim());
  const isSteps = chart.kind === "steps";
  const traces = chart.traces.map((trace, index) => ({
    ...(isSteps ? stepTrace(trace, chart) : trace), name: short(trace.name), type: "scatter", mode: trace.x.length > 1 ? "lines" : "markers",
    line: { color: series[index % series.length], width: 2 },
    ...(isSteps ? { fill: "tozeroy", fillcolor: `${series[index % series.length]}1f` } : {}),
    hovertemplate: isSteps ? "%{text}: %{y:.1%}" : "rank %{x:,}: %{y:,}",
  }));
  const line = (shape) => ({ type: "line", line: { color: colour("--soft"), width: 1.2, dash: "dot" }, ...shape });
  const shapes = (chart.lines_x || []).map((x) => line({ x0: x, x1: x, yref: "paper", y0: 0, y1: 1 }));
  const note = { showarrow: false, font: { color: colour("--soft"), size: 11.5 } };
  // The numbers of two lines that are close stay apart: the first ends at its line, the last begins there.
  const side = (index, last) => last === 0 ? "center" : index === 0 ? "right" : index === last ? "left" : "center";
  const annotations = (chart.lines_x || []).map((x, index, all) => ({ ...note, x, xanchor: side(index, all.length - 1), yref: "paper", y: 1, yanchor: "bottom", text: `${x}` }));
  if (chart.line_y) {
    shapes.push(line({ xref: "paper", x0: 0, x1: 1, y0: chart.line_y, y1: chart.line_y }));
    annotations.push({ ...note, xref: "paper", x: 1, xanchor: "right", y: Math.log10(chart.line_y), yanchor: "bottom", text: chart.line_text });
  }
  Plotly.react(chart.id, traces, {
    ...layout(),
    xaxis: axis(chart.x, chart.log ? { type: "log", dtick: 1 } : { rangemode: "tozero" }),
    yaxis: axis(chart.y, chart.log ? { type: "log", dtick: 1 } : { rangemode: "tozero", tickformat: ".0%" }),
    // More names than this would leave no room for the lines, which say theirs when pointed at.
    showlegend: 1 < traces.length && traces.length <= 8, legend: { orientation: "h", y: -0.28, x: 0 }, shapes, annotations,
  }, options);
}

async function unpackPlotly() {
  const packed = document.getElementById("plotly-packed");
  const bytes = Uint8Array.from(atob(packed.textContent), (character) => character.charCodeAt(0));
  packed.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const drawAll = () => charts.forEach(draw);
unpackPlotly().then(() => {
  drawAll();
  root.dataset.charts = "drawn";
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
});
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  if (window.Plotly) drawAll();
});

// Downloads: made in the page from what it shows, so they need no network.
const button = (text, label, act) => {
  const element = document.createElement("button");
  element.type = "button"; element.textContent = text; element.title = label; element.setAttribute("aria-label", label);
  element.addEventListener("click", act);
  return element;
};

function save(name, lines) {
  // Numbers lose their thousands' commas; what a spreadsheet would take for a formula is quoted, as in nouns.csv.
  const cellOf = (value) => {
    let text = String(value ?? "").trim();
    if (/^-?[\d,]+(\.\d+)?$/.test(text)) text = text.replaceAll(",", "");
    else if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = lines.map((line) => line.map(cellOf).join(",") + "\r\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", csv], { type: "text/csv" }));
  link.download = fileName(name, "csv");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
const fileName = (name, suffix) => `${root.dataset.run}-${name}.${suffix}`;

function linesOfChart(chart) {
  if (chart.kind === "bars") return [["set", "VN/DN", "standard error"], ...chart.names.map((name, index) => [name, chart.values[index], chart.errors[index]])];
  if (chart.kind === "line") return [["set", chart.x, chart.y], ...chart.traces.flatMap((trace) => trace.x.map((x, index) => [trace.name, x, trace.y[index]]))];
  const half = (chart.width - 1) / 2;
  return [["from", "to", ...chart.traces.map((trace) => trace.name)],
    ...chart.traces[0].x.map((x, index) => [x - half, x + half, ...chart.traces.map((trace) => trace.y[index])])];
}

function saveImage(chart, format) {
  const { data, layout } = document.getElementById(chart.id);
  const figure = { data, layout: { ...layout, paper_bgcolor: colour("--card"), title: { text: chart.title }, margin: { ...layout.margin, t: 60 } } };
  Plotly.downloadImage(figure, { format, width: 960, height: 560, scale: 2, filename: fileName(chart.id, "").slice(0, -1) });
}

for (const chart of charts) {
  const tools = document.createElement("p");
  tools.className = "tools";
  tools.append(
    ...["png", "svg"].map((format) => button(format.toUpperCase(), `Download the chart "${chart.title}" as ${format.toUpperCase()}`, () => saveImage(chart, format))),
    button("CSV", `Download the numbers of the chart "${chart.title}" as CSV`, () => save(chart.id, linesOfChart(chart))));
  document.getElementById(chart.id).after(tools);
}

// Tables: a button each, and on a phone a cell says which column it is of.
const textOf = (element) => element.dataset.text || element.innerText.replace(/\s+/g, " ");
function linesOfTable(table) {
  if (table.id === "noun-table") return [[...table.tHead.rows[0].cells].map(textOf), ...wantedRows()];
  return [...table.rows].filter((row) => !row.querySelector(".group")).map((row) => [...row.cells].flatMap((part) => [textOf(part), ...Array(part.colSpan - 1).fill("")]));
}
for (const table of document.querySelectorAll("main table")) {
  const tools = document.createElement("p");
  tools.className = "tools";
  const name = table.dataset.file;
  tools.append(button("CSV", `Download the table ${name} as CSV`, () => save(name, linesOfTable(table))));
  table.closest(".scroll").after(tools);
  if (!table.matches(".stack")) continue;
  const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  for (const row of table.tBodies[0].parentElement.querySelectorAll("tbody tr")) [...row.cells].forEach((part, index) => { if (part.colSpan === 1) part.dataset.label = heads[index]; });
}
root.classList.add("with-script");

// Noun table: rows are text, never HTML.
const nouns = JSON.parse(document.getElementById("noun-data").textContent);
const body = document.querySelector("#noun-table tbody");
const buttons = [...document.querySelectorAll("#noun-table button")];
const search = document.getElementById("search");
const more = document.getElementById("more");
const PAGE = 100;
let shown = PAGE, column = null, direction = -1;

function cell(kind, text, className) {
  const element = document.createElement(kind);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function caption(noun, text) {
  const element = document.createElement("td");
  element.dir = "auto";
  // The word itself, and not "car" in "scarf"; its letters where no such word is, as in scripts without spaces.
  const letters = noun.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const found = text.match(new RegExp(`(?<![\\p{L}\\p{M}\\p{N}_])${letters}(?![\\p{L}\\p{M}\\p{N}_])`, "iu")) || text.match(new RegExp(letters, "iu"));
  if (!found) { element.textContent = text; return element; }
  const marked = document.createElement("mark");
  marked.textContent = found[0];
  element.append(text.slice(0, found.index), marked, text.slice(found.index + found[0].length));
  return element;
}

function wantedRows() {
  const wanted = search.value.trim().toLowerCase();
  let rows = nouns.filter((row) => !wanted || row[0].includes(wanted) || row[row.length - 1].toLowerCase().includes(wanted));
  if (wanted) rows.sort((a, b) => b[0].includes(wanted) - a[0].includes(wanted));
  if (column === 0) rows = rows.slice().sort((a, b) => direction * (a[0] < b[0] ? -1 : 1));
  else if (column !== null) rows = rows.slice().sort((a, b) => direction * (a[column] - b[column]));
  return rows;
}

function show() {
  const rows = wantedRows();
  body.replaceChildren(...rows.slice(0, shown).map((row) => {
    const line = document.createElement("tr");
    const head = cell("th", short(row[0], 48));
    head.scope = "row";
  
    line.append(head, ...row.slice(1, -1).map((count) => cell("td", count.toLocaleString("en"), "n")), caption(row[0], row[row.length - 1]));
    return line;
  }));
  document.getElementById("found").textContent = `${rows.length.toLocaleString("en")} of ${nouns.length.toLocaleString("en")} nouns`;
  more.hidden = rows.length <= shown;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    const chosen = Number(button.dataset.column);
    direction = chosen === column ? -direction : (chosen === 0 ? 1 : -1);
    column = chosen;
    for (const other of buttons) other.closest("th").removeAttribute("aria-sort");
    button.closest("th").setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    show();
  });
}
search.addEventListener("input", () => { shown = PAGE; show(); });
more.addEventListener("click", () => { shown += PAGE * 3; show(); });
show();
