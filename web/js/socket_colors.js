// Colors for the pack's own socket types, on dark and on light palettes. A palette that names one of them wins.
import { app } from "../../../scripts/app.js";

const COLORS = {
  JANUS_MODEL: { dark: "#8E7CFF", light: "#4B3BC4" },
  VQ_VAE: { dark: "#FF8A50", light: "#C2501A" },
  DCDD_DECODER: { dark: "#D4B483", light: "#8A6A35" },
  TOKEN_LOGITS: { dark: "#26C6B0", light: "#00796B" },
  DCDD_CONDITION: { dark: "#C6D63C", light: "#6B7A00" },
  CALIBRATION: { dark: "#F06292", light: "#AD1457" },
};

const sheet = document.createElement("style");
let theme = "dark";

// Versions of the page mark a light palette in different ways; all of them set --bg-color.
function isLight() {
  const pen = document.createElement("canvas").getContext("2d");
  pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--bg-color");
  pen.fillRect(0, 0, 1, 1);
  const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
  return red + green + blue > 3 * 127;
}

// Nodes 2.0 reads CSS variables. The page removes its inline ones when a palette is loaded; a style sheet stays.
function update() {
  theme = isLight() ? "light" : "dark";
  const rules = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color[theme]};`);
  sheet.textContent = `:root { ${rules.join(" ")} }`;
  app.canvas.setDirty(true, true);
}

// The canvas reads these maps. A palette that is loaded writes an empty text for every type that it does not name.
function addColors(map) {
  for (const [type, color] of Object.entries(COLORS)) {
    let named = map[type];
    Object.defineProperty(map, type, {
      get: () => named || color[theme],
      set: (value) => {
        named = value;
        requestAnimationFrame(update); // after the rest of the palette
      },
      enumerable: true,
      configurable: true,
    });
  }
}

app.registerExtension({
  name: "DCDD.SocketColors",
  setup() {
    document.head.append(sheet);
    addColors(app.canvas.default_connection_color_byType);
    addColors(app.canvas.constructor.link_type_colors);
    update();
  },
});
