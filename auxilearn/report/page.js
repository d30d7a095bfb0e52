"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // Light and dark: as the system says, until the button is pressed.
  const theme = byId("theme");
  const dark = () =>
    (document.documentElement.dataset.theme ??
      (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const nameTheme = () => {
    theme.textContent = dark() ? "Light page" : "Dark page";
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    nameTheme();
  });
  nameTheme();

  const showThumbs = (root) => {
    for (const img of root.querySelectorAll("img[data-thumb]")) {
      img.src = "data:image/jpeg;base64," + data.thumbs[img.dataset.thumb];
      img.removeAttribute("data-thumb");
    }
  };
  // One contact sheet at a time.
  const chooser = byId("sheet-task");
  if (chooser) {
    const place = byId("sheet");
    const show = () => {
      place.innerHTML = data.sheets[chooser.value];
      showThumbs(place);
    };
    chooser.closest(".controls").hidden = false;
    chooser.addEventListener("change", show);
  }

  // A table's headers sort it: buttons, so that they work from the keyboard.
  const sortable = (table, sort) => {
    for (const button of table.querySelectorAll("thead button")) {
      button.disabled = false;
      button.addEventListener("click", () => {
        const header = button.closest("th");
        const before = header.getAttribute("aria-sort");
        const first = header.dataset.first ?? "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const now = before === first ? other : first;
        for (const th of table.querySelectorAll("th")) th.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", now);
        sort(header.cellIndex, now === "ascending" ? 1 : -1);
      });
    }
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (a === null || a === "" || b === null || b === "") return (a === null || a === "" ? 1 : 0) - (b === null || b === "" ? 1 : 0);
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };

  const tasks = byId("task-table");
  if (tasks) {
    const body = tasks.tBodies[0];
    const rows = [...body.rows];
    const valueOf = (row, column) => {
      const value = row.cells[column].dataset.value ?? row.cells[column].textContent;
      return value === "" || Number.isNaN(Number(value)) ? value : Number(value);
    };
    sortable(tasks, (column, direction) => {
      rows.sort((a, b) => direction * compare(valueOf(a, column), valueOf(b, column)));
      body.append(...rows);
    });
    const filter = byId("task-filter");
    const apply = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const named = [...row.cells].filter((cell) => !cell.classList.contains("n"));
        const text = named.map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      byId("task-count").textContent = `${shown} of ${rows.length} tasks`;
    };
    filter.closest(".controls").hidden = false;
    filter.addEventListener("input", apply);
    apply();
  }

  const table = byId("sample-table");
  if (table) {
    const size = 50;
    const { columns, rows, classes } = data.samples;
    const at = Object.fromEntries(columns.map((name, i) => [name, i]));
    const classColumns = ["given", "prediction", "label"];
    const shown = (row, name) => (classColumns.includes(name) ? classes[row[at[name]]] : row[at[name]]);
    const keys = [...table.tHead.rows[0].cells].map((th) => th.dataset.key);
    const haystack = rows.map((row) =>
      ["id", "path", ...classColumns].map((name) => (name in at ? shown(row, name) : "")).join(" ").toLowerCase(),
    );
    let order = rows.map((_, i) => i);
    let chosen = order;
    let page = 0;
    const format = (value) => (Math.abs(value) < 100 ? value.toPrecision(3) : Math.round(value).toString());
    const cell = (row, key) => {
      if (key === "image") {
        const td = element("td");
        if (row[at.place] in data.thumbs) {
          const img = element("img");
          img.src = "data:image/jpeg;base64," + data.thumbs[row[at.place]];
          img.alt = "";
          td.append(img);
        }
        return td;
      }
      if (key === "suspected") return element("td", row[at.suspected] ? "suspected" : "");
      if (key === "truth") {
        const td = element("td");
        const wrong = row[at.label] !== row[at.given];
        td.append(element("span", wrong ? "\u2717 is " + shown(row, "label") : "\u2713 right", wrong ? "tag bad" : "tag fine"));
        return td;
      }
      const value = shown(row, key);
      if (key === "weight" || key === "loss") return element("td", value === null ? "" : format(value), "n");
      return element("td", String(value), typeof value === "number" ? "n" : "");
    };
    const render = () => {
      const part = chosen.slice(page * size, (page + 1) * size);
      table.tBodies[0].replaceChildren(
        ...part.map((i) => {
          const tr = element("tr");
          tr.append(...keys.map((key) => cell(rows[i], key)));
          return tr;
        }),
      );
      const last = Math.max(0, Math.ceil(chosen.length / size) - 1);
      byId("sample-count").textContent = chosen.length
        ? `${page * size + 1} to ${page * size + part.length} of ${chosen.length.toLocaleString("en")}`
        : "none";
      byId("previous").disabled = page === 0;
      byId("next").disabled = page >= last;
    };
    const apply = () => {
      const words = byId("sample-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
      const suspectsOnly = byId("suspects-only").checked;
      const wrongOnly = byId("wrong-only")?.checked;
      chosen = order.filter(
        (i) =>
          words.every((word) => haystack[i].includes(word)) &&
          (!suspectsOnly || rows[i][at.suspected]) &&
          (!wrongOnly || rows[i][at.label] !== rows[i][at.given]),
      );
      page = 0;
      render();
    };
    sortable(table, (column, direction) => {
      const key = keys[column];
      const value = (i) => (key === "truth" ? Number(rows[i][at.label] === rows[i][at.given]) : shown(rows[i], key));
      order = [...order].sort((a, b) => direction * compare(value(a), value(b)));
      apply();
    });
    for (const id of ["sample-filter", "suspects-only", "wrong-only"]) byId(id)?.addEventListener("input", apply);
    byId("previous").addEventListener("click", () => { page -= 1; render(); });
    byId("next").addEventListener("click", () => { page += 1; render(); });
    for (const controls of document.querySelectorAll(".controls.samples")) controls.hidden = false;
    apply();
  }
  document.documentElement.dataset.ready = "yes";
})();
