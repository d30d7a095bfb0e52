"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // Light or dark as the system says, until the button is pressed.
  const theme = byId("theme");
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = dark() ? "Light page" : "Dark page"; };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    nameTheme();
  });
  nameTheme();
  theme.hidden = false;
  for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;

  // One contact sheet at a time.
  byId("sheet-task")?.addEventListener("change", (event) => {
    for (const sheet of document.querySelectorAll("[data-sheet]")) sheet.hidden = sheet.dataset.sheet !== event.target.value;
  });

  // Headers sort a table. They are buttons, so that they work from the keyboard.
  const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b, direction) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // empty cells stay last
    const [x, y] = [Number(a), Number(b)];
    return direction * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y);
  };
  for (const button of document.querySelectorAll("th button")) {
    button.disabled = false;
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const first = header.dataset.first;
      const other = first === "ascending" ? "descending" : "ascending";
      const now = header.getAttribute("aria-sort") === first ? other : first;
      const body = header.closest("table").tBodies[0];
      for (const th of header.parentNode.cells) th.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", now);
      const column = header.cellIndex;
      body.append(...[...body.rows].sort((a, b) => compare(valueOf(a, column), valueOf(b, column), now === "ascending" ? 1 : -1)));
    });
  }

  // A filter hides rows that lack one of its words, or one of the classes that are ticked.
  for (const controls of document.querySelectorAll("[data-table]")) {
    const rows = [...byId(controls.dataset.table).tBodies[0].rows];
    const texts = new Map(rows.map((row) => [row, [...row.cells].filter((cell) => !cell.matches(".n")).map((cell) => cell.textContent).join(" ").toLowerCase()]));
    const apply = () => {
      const words = controls.querySelector("[type=search]").value.toLowerCase().split(/\s+/).filter(Boolean);
      const ticked = [...controls.querySelectorAll(":checked")].map((box) => box.value);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !(words.every((word) => texts.get(row).includes(word)) && ticked.every((name) => row.classList.contains(name)));
        shown += !row.hidden;
      }
      controls.querySelector("[role=status]").textContent = `${shown} of ${rows.length}`;
    };
    controls.addEventListener("input", apply);
    apply();
  }
  root.dataset.ready = "yes";
})();
