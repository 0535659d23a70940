// An object of the caller's schema, whole and then streamed.
import { generateText, Output, streamText } from "ai";
import { City, model, options, print } from "./service.mjs";

const ask = {
  ...options,
  model: model("tools"),
  prompt: "What is the weather in Paris?",
  output: Output.object({ schema: City, name: "city" }),
};
const whole = await generateText(ask);
const stream = streamText(ask);
const parts = [];
for await (const part of stream.partialOutputStream) parts.push(part);
print({ whole: whole.output, last: parts.at(-1), streamed: await stream.output });
