"""PPO as a data loader plus a loss, on the loop of `transformers.Trainer`.

The whole of training, with each Trainer event in its place:

    on_train_begin
    for epoch in epochs:                                  # one pass over the prompts
        on_epoch_begin
        for batch of prompts:                             # an iteration; ExperienceLoader
            rollout    = roll_out(policy, prompts)        # ppo/rollout.py
            scored     = score(rollout)                   # ppo/score.py: one stacked pass, rewards
            experience = make_experience(scored)          # ppo/advantage.py: KL, GAE, whitening
            for _ in range(num_ppo_epochs):
                for mini_batch in experience:             # num_mini_batches of them
                    on_step_begin
                    for micro_batch in mini_batch:        # gradient accumulation
                        compute_loss(micro_batch).backward()   # ppo/loss.py
                        on_substep_end                    # but after the last
                    clip gradients
                    on_pre_optimizer_step
                    optimizer.step()
                    on_optimizer_step
                    scheduler.step()
                    on_step_end                           # global_step + 1; target_kl may end
                                                          # the iteration here
                    log, evaluate, save                   # a save waits for the iteration's end
        on_epoch_end
    on_train_end
"""

from trl_sync.ppo.config import BatchPlan, PPOConfig
from trl_sync.ppo.trainer import PPOTrainer

__all__ = ["BatchPlan", "PPOConfig", "PPOTrainer"]
