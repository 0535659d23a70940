// A tool loop of two steps, whole and then streamed: a call that must be made, and an answer.
import { generateText, stepCountIs, streamText } from "ai";
import { model, options, print, tools } from "./service.mjs";

const ask = {
  ...options,
  model: model("tools"),
  tools,
  prompt: "What is the weather in Paris?",
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
};
const facts = (steps) =>
  steps.map((step) => ({
    calls: step.toolCalls.map(({ toolName, input, invalid }) => ({ toolName, input, invalid })),
    results: step.toolResults.map((result) => result.output),
    text: step.text,
  }));

const whole = await generateText(ask);
const stream = streamText(ask);
await stream.consumeStream();
print({ whole: facts(whole.steps), streamed: facts(await stream.steps) });
