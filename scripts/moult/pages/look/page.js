// What a page does: a switch of the theme, boxes that scroll, tables that sort, lists that filter. Without this script all is shown.
"use strict";

// --- theme: as the system has it, light, dark ---
const themes = ["system", "light", "dark"];
const button = document.querySelector("button.theme");
const keep = { read() { try { return localStorage.getItem("moult-theme"); } catch { return null; } },
  write(value) { try { localStorage.setItem("moult-theme", value); } catch { /* a page in a frame has no storage */ } } };
function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.textContent = `Theme: ${theme}`;
}
button.hidden = false;
let theme = themes.includes(keep.read()) ? keep.read() : "system";
setTheme(theme);
button.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  keep.write(theme);
  setTheme(theme);
});

// --- boxes: the keyboard reaches what scrolls, and only that ---
const scrolls = (box) => box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
const boxes = new ResizeObserver((changes) => {
  for (const { target } of changes) {
    const box = target.closest(".scroll, .text, pre");
    if (scrolls(box)) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
});
for (const box of document.querySelectorAll(".scroll, .text, pre")) boxes.observe(box);
for (const table of document.querySelectorAll(".scroll > table")) boxes.observe(table); // sorted, it is wider

// --- tables: a click on a heading sorts by that column; data-value is what counts, else the text ---
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headings.forEach((heading, column) => {
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.append(...heading.childNodes);
    heading.append(sorter);
    sorter.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") === "descending" || !heading.hasAttribute("aria-sort") && !heading.classList.contains("number");
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row), row]);
      const numbers = rows.every(([text]) => text === "" || !Number.isNaN(Number(text)));
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what is not there comes last
        return (up ? 1 : -1) * (numbers ? Number(a) - Number(b) : a.localeCompare(b));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// --- filters: a list names what it filters (data-filters="#id"); each control matches data-<its name> of an entry ---
for (const filters of document.querySelectorAll(".filters")) {
  const entries = [...document.querySelectorAll(`${filters.dataset.filters} [data-entry]`)];
  const told = filters.querySelector("output");
  const controls = [...filters.querySelectorAll("select, input")];
  const matches = (entry, control) => {
    const wanted = control.value.trim().toLowerCase();
    if (!wanted) return true;
    if (control.type === "search") return entry.textContent.toLowerCase().includes(wanted);
    return (entry.dataset[control.name] ?? "").toLowerCase().split(" ").includes(wanted);
  };
  const apply = () => {
    let count = 0;
    for (const entry of entries) {
      entry.hidden = !controls.every((control) => matches(entry, control));
      if (!entry.hidden) count += 1;
    }
    if (told) told.textContent = `${count} of ${entries.length} shown`;
  };
  for (const control of controls) control.addEventListener("input", apply);
  filters.hidden = false;
  apply();
}
