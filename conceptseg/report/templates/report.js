"use strict";
// Tables: a click on a heading sorts by it; rows without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
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
}

// Bars of one method's words or classes.
for (const box of document.querySelectorAll(".parts")) {
  const parts = JSON.parse(box.querySelector("script").textContent);
  const choice = box.querySelector("select");
  const bars = box.querySelector(".bars");
  const draw = () => {
    bars.replaceChildren();
    const chosen = [...parts[choice.value]].sort((a, b) => b.value - a.value);
    for (const part of chosen) {
      const name = document.createElement("span");
      name.textContent = `${part.name} (n=${part.n})`;
      const track = document.createElement("span");
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.display = "block";
      bar.style.width = `${100 * part.value}%`;
      track.append(bar);
      const number = document.createElement("span");
      const bounds = part.low === null ? "" : ` [${(100 * part.low).toFixed(1)}, ${(100 * part.high).toFixed(1)}]`;
      number.textContent = `${(100 * part.value).toFixed(1)}${bounds}`;
      bars.append(name, track, number);
    }
  };
  choice.addEventListener("change", draw);
  draw();
}

// Pictures: chosen by score, shown page by page, maps laid over the photo.
const PAGE = 48;
for (const box of document.querySelectorAll(".pictures")) {
  const { methods, samples } = JSON.parse(box.querySelector("script").textContent);
  const gallery = box.querySelector(".gallery");
  const field = (name) => box.querySelector(`[name="${name}"]`);
  const count = box.querySelector(".count");
  const more = box.querySelector(".more");
  let chosen = [];
  let shown = 0;

  const choose = () => {
    const at = Number(field("method").value);
    const word = field("word").value;
    const text = field("search").value.trim().toLowerCase();
    chosen = samples.filter((s) => s.scores[at] !== null && (!word || s.words.includes(word)) &&
      (!text || s.key.toLowerCase().includes(text)));
    const score = (s) => s.scores[at];
    const spread = (s) => {
      const held = s.scores.filter((v) => v !== null);
      return Math.max(...held) - Math.min(...held);
    };
    const sorted = chosen.map(score).sort((a, b) => a - b);
    const middle = sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
    const orders = {
      best: (a, b) => score(b) - score(a),
      worst: (a, b) => score(a) - score(b),
      median: (a, b) => Math.abs(score(a) - middle) - Math.abs(score(b) - middle),
      disagreement: (a, b) => spread(b) - spread(a),
      key: (a, b) => a.key.localeCompare(b.key),
    };
    chosen.sort(orders[field("order").value]);
    gallery.replaceChildren();
    shown = 0;
    page();
  };

  const picture = (source, kind, alt) => {
    const image = document.createElement("img");
    image.src = source;
    image.alt = alt;
    image.loading = "lazy";
    image.className = kind === "photo" ? "photo" : `layer ${kind}`;
    return image;
  };

  const page = () => {
    const at = Number(field("method").value);
    for (const sample of chosen.slice(shown, shown + PAGE)) {
      const figure = document.createElement("figure");
      const stack = document.createElement("div");
      stack.className = "stack";
      stack.append(picture(sample.photo, "photo", `${sample.words.join(", ")}: ${sample.key}`));
      if (sample.maps[at]) stack.append(picture(sample.maps[at], "map", "map"));
      stack.append(picture(sample.truth, "truth", "truth"));
      if (sample.predictions[at]) stack.append(picture(sample.predictions[at], "prediction", "prediction"));
      const caption = document.createElement("figcaption");
      const scores = sample.scores.map((v, i) => `${methods[i]}: ${v === null ? "–" : (100 * v).toFixed(1)}`);
      caption.textContent = `${sample.words.join(", ")} · ${(100 * sample.scores[at]).toFixed(1)} · ${sample.key}`;
      figure.title = scores.join("\n");
      figure.dataset.score = sample.scores[at];
      figure.append(stack, caption);
      gallery.append(figure);
    }
    shown = Math.min(shown + PAGE, chosen.length);
    count.textContent = `${shown} of ${chosen.length} images`;
    more.hidden = shown >= chosen.length;
  };

  const layers = () => {
    for (const name of ["map", "truth", "prediction"]) gallery.classList.toggle(`show-${name}`, field(name).checked);
    gallery.style.setProperty("--map-opacity", field("opacity").value);
  };

  for (const name of ["method", "word", "order"]) field(name).addEventListener("change", choose);
  field("search").addEventListener("input", choose);
  for (const name of ["map", "truth", "prediction"]) field(name).addEventListener("change", layers);
  field("opacity").addEventListener("input", layers);
  more.addEventListener("click", page);
  layers();
  choose();
}
