"""What the models learn from: reviews to imitate, pairs to compare, prompts to complete."""

from dataclasses import dataclass
from random import Random

from .grammar import REVIEWS, STANCES, Prompt, draw_completion, draw_stance, prompts
from .verdict import judge

NUM_EVAL_PROMPTS = 256
# Pairs that are closer than this say nothing a reward model should learn.
LEAST_GAP = 0.05
# The reward a gap of one in the judge's score is worth, at least. Without a margin the loss is
# content with any order, and the best reviews score hardly above the good ones.
REWARD_PER_GAP = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Columns as TRL's trainers read them; no evaluation prompt occurs in what is trained on."""

    reviews: list[dict[str, str]]
    pairs: list[dict[str, str | float]]
    train_prompts: list[dict[str, str]]
    eval_prompts: list[dict[str, str]]


def draw_corpus(num_reviews: int, num_pairs: int, seed: int) -> Corpus:
    """The corpus of this seed, from one generator of its own."""
    random = Random(seed)
    everything = list(prompts(REVIEWS))
    random.shuffle(everything)
    held_out, training = everything[:NUM_EVAL_PROMPTS], everything[NUM_EVAL_PROMPTS:]
    return Corpus(
        reviews=[draw_review(random.choice(training), random) for _ in range(num_reviews)],
        pairs=[draw_pair(random.choice(training), random) for _ in range(num_pairs)],
        train_prompts=[{"prompt": prompt.text} for prompt in training],
        eval_prompts=[{"prompt": prompt.text} for prompt in held_out],
    )


def draw_review(prompt: Prompt, random: Random) -> dict[str, str]:
    """A review as SFTTrainer reads it."""
    completion = draw_completion(REVIEWS, prompt, draw_stance(random), random)
    return {"prompt": prompt.text, "completion": completion}


def draw_pair(prompt: Prompt, random: Random) -> dict[str, str | float]:
    """Two reviews of one thing as RewardTrainer reads them, the one the judge prefers as chosen.

    In a third of the pairs both reviewers share a stance, each stance as often as the next: else
    hardly any pair would teach which of two delighted reviews is the better one.
    """
    while True:
        stances = [random.choice(STANCES)] * 2
        if random.random() < 2 / 3:
            stances = [draw_stance(random), draw_stance(random)]
        first, second = (draw_completion(REVIEWS, prompt, stance, random) for stance in stances)
        gap = judge(prompt.text + first).score - judge(prompt.text + second).score
        if abs(gap) >= LEAST_GAP:
            chosen, rejected = (first, second) if gap > 0 else (second, first)
            return {
                "prompt": prompt.text,
                "chosen": chosen,
                "rejected": rejected,
                "margin": REWARD_PER_GAP * abs(gap),
            }
