// One answer, whole and then streamed.
import { generateText, streamText } from "ai";
import { model, options, print } from "./service.mjs";

const ask = {
  ...options,
  model: model("smollm2"),
  prompt: "What is the capital of France? Answer in one sentence.",
};
const whole = await generateText(ask);
const stream = streamText(ask);
const deltas = [];
for await (const delta of stream.textStream) deltas.push(delta);
print({
  text: whole.text,
  finishReason: whole.finishReason,
  outputTokens: whole.usage.outputTokens,
  deltas,
  streamedFinishReason: await stream.finishReason,
  streamedOutputTokens: (await stream.usage).outputTokens,
});
