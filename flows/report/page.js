"use strict";
(() => {
  document.documentElement.classList.add("js");

  // Sorting: heads become buttons; what is missing stays last in both directions.
  const keyOf = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim().toLowerCase();
    return "value" in cell.dataset ? Number(cell.dataset.value) : null;
  };
  const sort = (table, head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const numeric = head.classList.contains("n");
    const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("sum"));
    const missing = (key) => key === null || key === "" || key === "–";
    const keyed = rows.map((row) => [keyOf(row, column, numeric), row]);
    keyed.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = numeric ? a - b || 0 : a.localeCompare(b);
      return down ? -order : order;
    });
    const last = table.tBodies[0].querySelector("tr.sum");
    for (const [, row] of keyed) table.tBodies[0].insertBefore(row, last);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  };
  for (const table of document.querySelectorAll(".sheet table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, head, column));
      head.append(button);
    });
  }

  // Filtering: a row stays if it holds every word.
  const tools = (sheet) => {
    const items = [...sheet.querySelectorAll("[data-item]")];
    if (items.length < 6) return;
    const box = document.createElement("div");
    box.className = "tools";
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = "filter rows";
    field.setAttribute("aria-label", `filter: ${sheet.dataset.filter}`);
    const said = document.createElement("output");
    const texts = items.map((item) => item.textContent.toLowerCase());
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      items.forEach((item, i) => {
        item.hidden = !words.every((word) => texts[i].includes(word));
        left += !item.hidden;
      });
      said.textContent = words.length ? `${left} of ${items.length}` : "";
    });
    box.append(field, said);
    if ("folds" in sheet.dataset) {
      const fold = document.createElement("button");
      fold.type = "button";
      fold.textContent = "open all";
      fold.addEventListener("click", () => {
        const open = fold.textContent === "open all";
        for (const item of items) item.open = open;
        fold.textContent = open ? "close all" : "open all";
      });
      box.append(fold);
    }
    const title = sheet.querySelector("h3");
    if (title) title.after(box);
    else sheet.prepend(box);
  };
  document.querySelectorAll("[data-filter]").forEach(tools);

  // Plots: their colours are words, given values for the ground they are on.
  const source = document.getElementById("plots");
  if (!source || !window.Plotly) return;
  const figures = JSON.parse(source.textContent);
  const LIGHT = {
    ink: "#1b1d20", grid: "#dedfda", blue: "#0072b2", orange: "#d55e00", green: "#009e73", grey: "#85898e",
    purple: "#aa4499", gold: "#a07c00",
  };
  const DARK = {
    ink: "#e6e6e2", grid: "#34383d", blue: "#56b4e9", orange: "#f09a52", green: "#3cc79b", grey: "#9aa0a6",
    purple: "#e08fd0", gold: "#e6c34a",
  };
  const painted = (value, colours) => {
    if (typeof value === "string") return value[0] === "@" ? colours[value.slice(1)] || value : value;
    if (Array.isArray(value)) return value.map((item) => painted(item, colours));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, colours)]));
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const settings = {
    responsive: true, displaylogo: false, plotlyServerURL: "", typesetMath: false,
    modeBarButtons: [["toImage", "resetScale2d"]],
  };
  const draw = (paper) => {
    const colours = dark.matches && !paper ? DARK : LIGHT;
    for (const [name, figure] of Object.entries(figures)) {
      const place = document.getElementById(`plot-${name}`);
      const { data, layout } = painted(figure, colours);
      const narrow = place.clientWidth < 480;
      if (narrow || paper) layout.font.size = paper ? 10 : 11;
      if (paper) Object.assign(layout, { width: place.closest(".pair") ? 325 : 660, height: 260 });
      else layout.autosize = true;
      layout.hoverlabel.bgcolor = colours.grid;
      layout.hoverlabel.font = { color: colours.ink };
      window.Plotly.react(place, data, layout, { ...settings, displayModeBar: narrow ? false : "hover" });
    }
  };
  draw(false);
  dark.addEventListener("change", () => draw(false));
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
})();
