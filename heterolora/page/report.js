"use strict";
// Tables that sort and filter, and figures that are drawn when they come into view. Texts of runs reach the page as
// text only (textContent), never as markup.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  // -- tables ----------------------------------------------------------------------------------------------------

  function tableOf(given) {
    const head = given.columns.map((column) =>
      make("th", { scope: "col", class: column.numeric ? "number" : undefined, title: column.hint }, column.name));
    const rows = given.rows.map((row) => make("tr", {}, ...row.map((cell, index) => make("td", {
      class: given.columns[index].numeric ? "number" : undefined,
      "data-value": cell.value === null ? undefined : String(cell.value),
    }, cell.text))));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    const box = make("div", { class: "tablebox" },
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": given.caption }, table));
    enhance(box);
    return box;
  }

  function enhance(box) {
    const table = box.querySelector("table");
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const count = make("span", { role: "status" });
    const input = make("input", { type: "search", placeholder: "filter", "aria-label": "filter the rows by text" });
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += row.hidden ? 0 : 1;
      }
      count.textContent = left === rows.length ? `${rows.length} rows` : `${left} of ${rows.length} rows`;
    };
    input.addEventListener("input", filter);
    if (rows.length > 3) box.prepend(make("div", { class: "filter" }, input, count));
    filter();

    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      const numeric = head.classList.contains("number");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const down = before === "none" ? numeric : before === "ascending"; // numbers: largest first
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(column, numeric, down);
      });
    });

    function sort(column, numeric, down) {
      const keyed = rows.map((row, place) => ({ row, place, value: row.cells[column].dataset.value }));
      keyed.sort((a, b) => {
        if (a.value === undefined || b.value === undefined) { // what has no value stands last, both ways
          return (a.value === undefined) - (b.value === undefined) || a.place - b.place;
        }
        const order = numeric
          ? Number(a.value) - Number(b.value)
          : a.value.localeCompare(b.value, "en", { numeric: true });
        return (down ? -order : order) || a.place - b.place;
      });
      body.append(...keyed.map((one) => one.row));
    }
  }

  // -- figures ---------------------------------------------------------------------------------------------------

  const wanted = new Map(); // element -> the figure that it shows
  const settings = {
    displaylogo: false, responsive: false, scrollZoom: false, doubleClick: false, displayModeBar: false, plotlyServerURL: "",
  };

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "300px" });

  function widthFor(element, figure) {
    return Math.max(element.clientWidth, figure.layout.meta.least);
  }

  function draw(element) {
    const figure = wanted.get(element);
    if (!figure) return;
    const layout = { ...structuredClone(figure.layout), width: widthFor(element, figure) };
    element.dataset.drawn = "yes";
    Plotly.react(element, structuredClone(figure.data), layout, settings);
  }

  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const [element, figure] of wanted) {
        if (element.dataset.drawn) Plotly.relayout(element, { width: widthFor(element, figure) });
      }
    }, 120);
  });

  function forget(place) {
    for (const element of place.querySelectorAll(".plot")) {
      watcher.unobserve(element);
      wanted.delete(element);
      if (element.dataset.drawn) Plotly.purge(element);
    }
    place.replaceChildren();
  }

  function panelOf(panel, block) {
    const plot = make("div", { class: "plot" });
    plot.style.minHeight = `${Math.min(640, panel.choices[0].figure.layout.height)}px`;
    const caption = make("figcaption", {}, ...(panel.caption ? [make("span", {}, panel.caption)] : []));
    wanted.set(plot, panel.choices[0].figure);
    if (panel.choices.length > 1) {
      const select = make("select", { "aria-label": panel.caption || "shown" },
        ...panel.choices.map((choice, index) => make("option", { value: index }, choice.name)));
      select.addEventListener("change", () => {
        wanted.set(plot, panel.choices[Number(select.value)].figure);
        draw(plot);
      });
      caption.append(select);
    } else if (panel.choices[0].name) {
      caption.append(make("span", { class: "text" }, panel.choices[0].name));
    }
    const save = make("button", { type: "button", class: "link save", title: "save this figure as a vector graphic" }, "SVG");
    save.addEventListener("click", () => {
      const { height } = wanted.get(plot).layout;
      const filename = panel.caption || block.title;
      Plotly.downloadImage(plot, { format: "svg", width: widthFor(plot, wanted.get(plot)), height, filename });
    });
    caption.append(save);
    watcher.observe(plot);
    const { height, meta } = panel.choices[0].figure.layout;
    if (height > 640) plot.classList.add("tall");
    return make("figure", { class: meta.least > 600 ? "wide" : undefined }, caption, plot);
  }

  function blockOf(block, level, tag) {
    const parts = [make(level, {}, block.title)];
    if (block.text) parts.push(make("p", { class: "text" }, block.text));
    parts.push(make("div", { class: "panels" }, ...block.panels.map((panel) => panelOf(panel, block))));
    return make(tag, { class: "block" }, ...parts);
  }

  // -- one run ---------------------------------------------------------------------------------------------------

  const shown = document.getElementById("shown");
  const chosen = document.getElementById("chosen");

  async function show(number) {
    chosen.value = String(number);
    const run = await unpack(content.runs[number]);
    if (chosen.value !== String(number)) return; // another one was chosen meanwhile
    forget(shown);
    if (content.runs.length > 1) shown.append(make("p", { class: "origin" }, run.title));
    if (run.notes.length) shown.append(make("ul", { class: "notes" }, ...run.notes.map((note) => make("li", {}, note))));
    shown.append(make("dl", { class: "facts" },
      ...run.facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
    shown.append(...run.blocks.map((block) => blockOf(block, "h3", "div")));
    if (run.sites) shown.append(make("h3", {}, "Sites"), tableOf(run.sites));
    for (const button of document.querySelectorAll("button[data-run]")) {
      button.closest("tr").classList.toggle("chosen", button.dataset.run === String(number));
    }
    shown.dataset.run = String(number);
  }

  function step(by) {
    const count = content.runs.length;
    show((Number(chosen.value) + by + count) % count);
  }

  async function start() {
    document.querySelectorAll("[data-table]").forEach(enhance);
    chosen.addEventListener("change", () => show(Number(chosen.value)));
    document.getElementById("before").addEventListener("click", () => step(-1));
    document.getElementById("after").addEventListener("click", () => step(1));
    for (const button of document.querySelectorAll("button[data-run]")) {
      button.addEventListener("click", async () => {
        await show(Number(button.dataset.run));
        const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
        document.getElementById("run").scrollIntoView({ behavior: still ? "instant" : "smooth" });
      });
    }
    const overview = await unpack(content.overview);
    document.getElementById("overview").append(...overview.map((block) => blockOf(block, "h2", "section")));
    await show(content.first);
  }

  start();
})();
