// Chinese names for the options of the pack's combos. The page's own locale files name inputs, not their options.
// A workflow keeps the English ones: only what is shown changes.
import { app } from "../../../scripts/app.js";

const CHINESE = {
  "pico (built in)": "pico（内置）",
  "pico progressive (built in)": "pico 渐进（内置）",
  "pico llamagen (built in)": "pico LlamaGen（内置）",
  auto: "自动",
  float32: "float32",
  bfloat16: "bfloat16",
  float16: "float16",
  "8-bit": "8 位",
  "low VRAM": "低显存",
  CPU: "CPU",
  "in the bundle": "在解码器包中",
  "with the bundle, or connected": "随解码器包，或由插槽连接",
  "hard: the tokens": "硬：令牌",
  "soft: the expected codes": "软：期望码",
  "soft: the distributions": "软：分布",
  confidence: "置信度",
  "the model's own": "模型自己的",
  "quantisation-error": "量化误差",
  importance: "重要性",
  halton: "Halton 序列",
  random: "随机",
  raster: "逐行",
  "as measured best for the decoder": "对该解码器实测最佳",
  "FLUX: by resolution": "FLUX：按分辨率",
  uniform: "均匀",
  "logits (the paper)": "logits（论文）",
  "logits anchored to the sampled tokens": "锚定到采样令牌的 logits",
  "sampled tokens alone": "仅采样到的令牌",
  "doubt: 1 - confidence": "疑虑：1 - 置信度",
  "narrow choice: 1 - margin": "难以取舍：1 - 差距",
  "spread: 1 - mass of the top k": "分散：1 - 前 k 个的概率",
  "tail entropy": "尾部熵",
  hard: "硬边",
  soft: "软边",
  "none yet: fit one and save it": "还没有：先拟合并保存一个",
};

app.registerExtension({
  name: "DCDD.ChineseOptions",
  nodeCreated(node) {
    const isOurs = node.comfyClass?.startsWith("DCDD_");
    if (!isOurs || app.extensionManager?.setting?.get("Comfy.Locale") !== "zh") return;
    for (const widget of node.widgets ?? []) {
      if (widget.type === "combo") widget.options.getOptionLabel = (option) => CHINESE[option] ?? option ?? "";
    }
  },
});
