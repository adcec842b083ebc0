"""Questions with lettered answers."""

from collections.abc import Sequence

from nanochat_jax.tasks.base import Conversation, assistant, user
from nanochat_jax.tasks.hub import HubTask


def multiple_choice(
    question: str, choices: Sequence[str], letters: Sequence[str], answer: str
) -> Conversation:
    """The conversation about one question; `letters[i]` stands for `choices[i]`, `answer` is one
    of the letters.

    The letter stands after its choice and right behind "=": so its token is the same as that of
    the reply, which is the bare letter, and small models bind a letter better to what came before
    it.
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
