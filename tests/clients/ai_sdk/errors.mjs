// What the caller sees of a prompt that is too long, whole and streamed, and of an unknown model.
import { generateText, streamText } from "ai";
import { model, options, print } from "./service.mjs";

const facts = (error) => ({
  name: error.name,
  status: error.statusCode,
  retryable: error.isRetryable,
  message: error.message,
});
const failure = async (ask) => {
  try {
    await generateText(ask);
  } catch (error) {
    return facts(error);
  }
};
const streamedFailure = async (ask) => {
  let found;
  const stream = streamText({ ...ask, onError: ({ error }) => (found = facts(error)) });
  await stream.consumeStream();
  return found;
};

const tooLong = { ...options, model: model("smollm2"), prompt: "word ".repeat(3000) };
print({
  whole: await failure(tooLong),
  streamed: await streamedFailure(tooLong),
  unknown: await failure({ ...options, model: model("absent"), prompt: "Hello" }),
});
