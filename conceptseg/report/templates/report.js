"use strict";
// Tables: a click on a heading sorts by it, rows without a number stay last; a word above hides rows without it.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.querySelectorAll("thead tr:last-child th")];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") !== "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? "";
      const numeric = heading.dataset.kind === "number";
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return descending ? -order : order;
      });
      body.append(...rows);
    });
  });
  table.closest("section").querySelector("[name=all]").addEventListener("change", (event) => {
    table.classList.toggle("few", !event.target.checked);
  });
  table.closest("section").querySelector("[name=rows]").addEventListener("input", (event) => {
    const text = event.target.value.trim().toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  });
}

const percent = (share) => (100 * share).toFixed(1);
const element = (name, className, text = "") => {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
};

// Bars of one method's words or classes.
for (const box of document.querySelectorAll(".parts")) {
  const parts = JSON.parse(box.querySelector("script").textContent);
  const choice = box.querySelector("[name=method]");
  const order = box.querySelector("[name=order]");
  const bars = box.querySelector(".bars");
  const draw = () => {
    const orders = {
      best: (a, b) => b.value - a.value, worst: (a, b) => a.value - b.value, images: (a, b) => b.n - a.n,
      name: (a, b) => a.name.localeCompare(b.name),
    };
    bars.replaceChildren();
    for (const part of [...parts[choice.value]].sort(orders[order.value])) {
      const track = element("span", "track");
      const bar = element("span", "bar");
      bar.style.width = `${100 * part.value}%`;
      track.append(bar);
      if (part.low !== null) {
        const whisker = element("span", "whisker");
        whisker.style.left = `${100 * part.low}%`;
        whisker.style.width = `${100 * (part.high - part.low)}%`;
        track.append(whisker);
      }
      const bounds = part.low === null ? "" : ` [${percent(part.low)}, ${percent(part.high)}]`;
      bars.append(element("span", "name", `${part.name} (n=${part.n})`), track, element("span", "", percent(part.value) + bounds));
    }
  };
  for (const field of [choice, order]) field.addEventListener("change", draw);
  draw();
}

// Pictures: sheets of tiles, photo and truth, and map and prediction of each method, laid over each other. Only cards near the
// window are on the page, and only the sheets of the chosen methods are loaded.
const GAP = 12;
const CAPTION = 52;
for (const box of document.querySelectorAll(".pictures")) {
  const { methods, samples, photos, maps, across: lineful, down: lines, side } = JSON.parse(box.querySelector("script").textContent);
  const gallery = box.querySelector(".gallery");
  const cards = gallery.querySelector(".cards");
  const dialog = box.querySelector("dialog");
  const field = (name) => box.querySelector(`[name="${name}"]`);
  const count = box.querySelector(".count");
  let chosen = [];
  let drawn = "";
  let enlarged = null;
  samples.forEach((sample, place) => {
    const held = sample.scores.filter((score) => score !== null);
    sample.spread = Math.max(...held) - Math.min(...held);
    sample.place = place;
  });
  if (maps.length > 1) field("beside").value = "1";
  box.style.setProperty("--zoom", side / (side - 1)); // the outer half pixel of a tile blends with its neighbour's, so it is cut

  const choose = () => {
    const at = Number(field("method").value);
    const word = field("word").value;
    const text = field("search").value.trim().toLowerCase();
    chosen = samples.filter((s) => s.scores[at] !== null && (!word || s.words.includes(word)) &&
      (!text || s.key.toLowerCase().includes(text)));
    const score = (s) => s.scores[at];
    const sorted = chosen.map(score).sort((a, b) => a - b);
    const middle = sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
    const orders = {
      best: (a, b) => score(b) - score(a),
      worst: (a, b) => score(a) - score(b),
      median: (a, b) => Math.abs(score(a) - middle) - Math.abs(score(b) - middle),
      disagreement: (a, b) => b.spread - a.spread,
      key: (a, b) => (a.key < b.key ? -1 : 1),
    };
    chosen.sort(orders[field("order").value]);
    count.textContent = `${chosen.length} of ${samples.length} images`;
    for (const name of ["map", "prediction"]) field(name).disabled = at >= maps.length;
    drawn = "";
    draw();
  };

  // One tile of a sample: the left or the right one of its pair in a sheet.
  const tile = (sample, sheets, right, kind) => {
    const made = element("span", kind === "photo" ? "tile photo" : `tile layer ${kind}`);
    const sheet = Math.floor(sample.place / (lineful * lines));
    const inside = sample.place % (lineful * lines);
    const held = Math.min(lineful * lines, samples.length - sheet * lineful * lines);
    const high = Math.ceil(held / lineful);
    made.style.setProperty("--sheet", `url("${sheets[sheet]}")`);
    made.style.setProperty("--columns", 2 * lineful);
    made.style.setProperty("--lines", high);
    made.style.setProperty("--x", `${(100 * (2 * (inside % lineful) + right)) / (2 * lineful - 1)}%`);
    made.style.setProperty("--y", high > 1 ? `${(100 * Math.floor(inside / lineful)) / (high - 1)}%` : "0");
    return made;
  };

  const stack = (sample, tiles) => {
    const square = element("span", "box");
    const made = element("span", "stack");
    const [width, height] = sample.size;
    made.style.width = `${(100 * width) / Math.max(width, height)}%`;
    made.style.aspectRatio = `${width} / ${height}`;
    made.append(...tiles);
    square.append(made);
    return square;
  };
  const photo = (sample) => tile(sample, photos, 0, "photo");
  const truth = (sample) => tile(sample, photos, 1, "truth");
  const scored = (sample, at) => (sample.scores[at] === null ? "–" : percent(sample.scores[at]));

  const shown = () => [...new Set([field("method").value, field("beside").value])].filter((at) => at !== "").map(Number);

  // A sample in the dialog: photo above truth, then each method's map above its prediction.
  const enlarge = (sample) => {
    enlarged = sample;
    const pairs = [[["photo", [photo(sample)]], ["truth", [photo(sample), truth(sample)]]]];
    for (const at of shown().filter((one) => one < maps.length)) {
      const said = `${methods[at]} · ${scored(sample, at)}`;
      pairs.push([[`${said}, map`, [tile(sample, maps[at], 0, "map")]],
        [`${said}, prediction`, [photo(sample), tile(sample, maps[at], 1, "prediction")]]]);
    }
    const large = dialog.querySelector(".large");
    large.replaceChildren(...pairs.map((pair) => {
      const column = element("div", "pair");
      column.append(...pair.map(([name, tiles]) => {
        const figure = element("figure", "");
        figure.append(stack(sample, tiles), element("figcaption", "", name));
        return figure;
      }));
      return column;
    }));
    dialog.querySelector("h4").textContent = `${sample.words.join(", ")} · ${sample.key}`;
    if (!dialog.open) dialog.showModal();
  };
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && chosen[chosen.indexOf(enlarged) + step];
    if (!next) return;
    event.preventDefault();
    enlarge(next);
  });

  const card = (sample) => {
    const figure = element("figure", "card");
    const boxes = element("button", "boxes");
    boxes.type = "button";
    for (const at of shown()) {
      const layers = at < maps.length ? [tile(sample, maps[at], 0, "map"), tile(sample, maps[at], 1, "prediction")] : [];
      boxes.append(stack(sample, [photo(sample), ...layers, truth(sample)]));
    }
    boxes.setAttribute("aria-label", `enlarge ${sample.words.join(", ")}, ${sample.key}`);
    boxes.addEventListener("click", () => enlarge(sample));
    const caption = element("figcaption", "", `${sample.words.join(", ")} · ${shown().map((at) => scored(sample, at)).join(" | ")}`);
    caption.append(element("span", "key", sample.key));
    figure.title = methods.map((name, i) => `${name}: ${scored(sample, i)}`).join("\n");
    figure.dataset.score = sample.scores[shown()[0]];
    figure.dataset.place = sample.place;
    figure.append(boxes, caption);
    return figure;
  };

  const draw = () => {
    const abreast = shown().length;
    const width = gallery.clientWidth;
    const across = Math.max(abreast > 1 ? 1 : 2, Math.floor((width + GAP) / (150 * abreast + GAP)));
    const height = (width + GAP) / across / abreast + CAPTION;
    const down = Math.ceil(chosen.length / across);
    gallery.style.height = `${down * height}px`;
    const top = -gallery.getBoundingClientRect().top;
    const first = Math.max(0, Math.min(Math.floor(top / height) - 2, down - 4));
    const last = Math.max(first + 4, Math.ceil((top + window.innerHeight) / height) + 2);
    if (drawn === `${across} ${width} ${first} ${last}`) return;
    drawn = `${across} ${width} ${first} ${last}`;
    cards.style.gridTemplateColumns = `repeat(${across}, minmax(0, 1fr))`;
    cards.style.gridAutoRows = `${height - GAP}px`;
    cards.style.transform = `translateY(${first * height}px)`;
    const focused = cards.contains(document.activeElement) ? document.activeElement.closest(".card").dataset.place : "";
    cards.replaceChildren(...chosen.slice(first * across, last * across).map(card));
    if (focused !== "") cards.querySelector(`[data-place="${focused}"] .boxes`)?.focus({ preventScroll: true });
  };

  const layers = () => {
    for (const name of ["map", "truth", "prediction"]) gallery.classList.toggle(`show-${name}`, field(name).checked);
    gallery.style.setProperty("--map-opacity", field("opacity").value);
  };

  for (const name of ["method", "beside", "word", "order"]) field(name).addEventListener("change", choose);
  field("search").addEventListener("input", choose);
  for (const name of ["map", "truth", "prediction"]) field(name).addEventListener("change", layers);
  field("opacity").addEventListener("input", layers);
  let waiting = false;
  const later = () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; draw(); });
    waiting = true;
  };
  window.addEventListener("scroll", later, { passive: true });
  window.addEventListener("resize", later);
  layers();
  choose();
}
