// Filters, sorts and chooses the ranking metric. Everything it needs is in the page; everything chosen is in the URL's hash.
"use strict";
(() => {
  const form = document.querySelector("form");
  const sections = [...document.querySelectorAll("section.question")];
  const rows = [...document.querySelectorAll("tr[data-row]")];
  const bars = [...document.querySelectorAll("li[data-row]")];
  const fields = ["q", "workload", "hardware", "model", "by"];
  const first = {}; // what each control says when nothing is chosen
  for (const name of fields) first[name] = form.elements[name].value;
  let sort = "";

  function read() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // a jump within the page
    const asked = new URLSearchParams(hash);
    for (const name of fields) {
      const control = form.elements[name];
      control.value = asked.has(name) ? asked.get(name) : first[name];
      if (control.value === "" && first[name] !== "") control.value = first[name]; // no such choice here
    }
    form.elements.ranked.checked = asked.get("ranked") === "1";
    sort = asked.get("sort") || "";
    show();
  }

  function write() {
    const chosen = new URLSearchParams();
    for (const name of fields) if (form.elements[name].value !== first[name]) chosen.set(name, form.elements[name].value);
    if (form.elements.ranked.checked) chosen.set("ranked", "1");
    if (sort) chosen.set("sort", sort);
    const hash = chosen.toString();
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
    show();
  }

  function cellOf(row, name) {
    return [...row.cells].find((cell) => cell.dataset.metric === name);
  }

  function keyOf(row, column) {
    if (column === "rank") return row.dataset.rank ? parseInt(row.dataset.rank, 10) : null;
    const cell = cellOf(row, column);
    if (cell) return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
    const text = row.querySelector(`[data-column="${CSS.escape(column)}"]`);
    return text ? text.textContent.trim().toLowerCase() : null;
  }

  function compare(column, falling) {
    return (a, b) => {
      const x = keyOf(a, column), y = keyOf(b, column);
      if (x === null || y === null) return (x === null) - (y === null); // what is missing comes last either way
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return falling ? -order : order;
    };
  }

  function show() {
    const by = form.elements.by.value;
    const words = form.elements.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const falling = sort.startsWith("-");
    const column = sort.replace(/^-/, "") || "rank";
    let count = 0;
    const seen = new Set();
    for (const section of sections) {
      const wanted = ["workload", "hardware", "model"].every(
        (name) => !form.elements[name].value || form.elements[name].value === section.dataset[name]);
      const [ranked, apart] = section.querySelectorAll("tbody");
      let here = 0, left = 0;
      for (const row of section.querySelectorAll("tr[data-row]")) {
        const cell = cellOf(row, by);
        const rank = cell ? cell.dataset.rank || "" : "";
        row.dataset.rank = rank;
        row.querySelector(".rank").textContent = rank || "–";
        row.querySelector(".why").textContent = rank ? "" : (cell && cell.dataset.why) || row.dataset.status;
        (rank ? ranked : apart).append(row);
        const text = row.dataset.text;
        row.hidden = !wanted || (form.elements.ranked.checked && !rank) || !words.every((word) => text.includes(word));
        if (!row.hidden) { here += 1; seen.add(row.dataset.row); if (!rank) left += 1; }
      }
      for (const body of [ranked, apart]) {
        body.append(...[...body.querySelectorAll("tr[data-row]")].sort(compare(column, falling)));
      }
      apart.hidden = !left;
      section.hidden = !here;
      count += here;
      for (const head of section.querySelectorAll("th[data-column]")) {
        if (head.closest("thead") === null) continue;
        if (head.dataset.column === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      }
      for (const figure of section.querySelectorAll("figure")) figure.hidden = figure.dataset.by !== by;
    }
    for (const bar of bars) bar.hidden = !seen.has(bar.dataset.row);
    for (const part of document.querySelectorAll(".by")) part.textContent = form.elements.by.selectedOptions[0].textContent;
    document.getElementById("count").textContent = `${count} of ${rows.length} rows shown`;
    document.getElementById("nothing").hidden = count > 0;
  }

  form.addEventListener("input", write);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const name of fields) form.elements[name].value = first[name];
    form.elements.ranked.checked = false;
    sort = "";
    write();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("thead button");
    if (!button) return;
    const column = button.closest("th").dataset.column;
    sort = sort === column || (!sort && column === "rank") ? "-" + column : column;
    if (sort === "rank") sort = "";
    write();
  });
  addEventListener("hashchange", read);
  form.hidden = false;
  read();
})();
