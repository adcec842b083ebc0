"""Multiple-choice questions with lettered answers."""

from collections.abc import Sequence

from nanochat_jax.tasks.base import Conversation, assistant, user
from nanochat_jax.tasks.hub import HubTask


def multiple_choice(
    question: str, choices: Sequence[str], letters: Sequence[str], answer: str
) -> Conversation:
    """The conversation about one question. `letters[i]` labels `choices[i]`; `answer` is a letter.

    Each letter follows its choice, directly after "=". So it is the same token as in the reply,
    which is only the letter, and small models associate a letter better with preceding text.
    """
    if len(choices) != len(letters) or answer not in letters:
        raise ValueError(
            f"{len(choices)} choices, letters {list(letters)}, answer {answer!r}: {question!r}"
        )
    lines = [f"Multiple Choice question: {question}"]
    lines += [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    lines += ["", "Respond only with the letter of the correct answer."]
    return {"messages": [user("\n".join(lines)), assistant(answer)], "letters": list(letters)}


class MultipleChoice(HubTask):
    """A categorical task: the reply is one of `conversation["letters"]`."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        if completion not in conversation["letters"]:
            raise ValueError(f"{completion!r} is none of the letters {conversation['letters']}")
        return completion == conversation["messages"][-1]["content"]
