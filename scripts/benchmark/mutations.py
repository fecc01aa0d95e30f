"""Mistakes that people make in this arithmetic, each as a change of one place, and the tests that should notice."""

# Which tests to ask when a file is broken: those of the file first, and whole runs on two ranks last.
TESTS: dict[str, tuple[str, ...]] = {
    "training/masking.py": ("test_masking.py", "test_losses.py", "test_rewards.py", "test_ppo.py"),
    "training/logprobs.py": ("test_logprobs.py", "test_forward.py", "test_packing.py", "test_ppo.py"),
    "training/advantages.py": ("test_advantages.py", "test_ppo.py"),
    "training/losses.py": ("test_losses.py", "test_ppo.py"),
    "training/rewards.py": ("test_rewards.py", "test_ppo.py"),
    "training/forward.py": ("test_forward.py", "test_packing.py", "test_ppo.py"),
    "training/packing.py": ("test_packing.py", "test_shared_prompts.py", "test_forward.py"),
    "training/attention.py": ("test_attention.py", "test_packing.py", "test_shared_prompts.py", "test_generation.py"),
    "training/tokenization.py": ("test_data.py", "test_models.py"),
    "training/data.py": ("test_data.py", "test_forward.py", "test_loop.py", "test_distributed.py"),
    "training/models.py": ("test_models.py", "test_export.py", "test_ppo.py"),
    "training/generation/sampler.py": ("test_generation.py",),
    "training/generation/responses.py": ("test_generation.py",),
    "training/generation/hf.py": ("test_generation.py", "test_ppo.py"),
    "training/generation/decoder.py": ("test_generation.py",),
    "training/generation/kv_cache.py": ("test_generation.py",),
    "training/generation/paged_cache.py": ("test_generation.py",),
    "training/generation/lean_layers.py": ("test_generation.py",),
    "training/generation/native.py": ("test_generation.py",),
    "training/optim.py": ("test_optim.py", "test_engine.py"),
    "training/distributed.py": ("test_distributed_helpers.py", "test_distributed.py"),
    "training/engine.py": ("test_engine.py", "test_loop.py", "test_distributed.py"),
    "training/loop.py": ("test_loop.py", "test_distributed.py"),
    "training/engine_state.py": ("test_resume.py", "test_engine_state.py"),
    "training/checkpoint.py": ("test_checkpoint.py", "test_resume.py"),
    "training/storage.py": ("test_storage.py", "test_storage_crashes.py"),
    "training/manifest.py": ("test_manifest.py", "test_storage.py"),
    "training/durable.py": ("test_durable.py", "test_storage_crashes.py"),
    "training/accounting.py": ("test_accounting.py", "test_resume.py"),
    "step3_ppo/progress.py": ("test_resume.py", "test_pipeline.py"),
    "training/metrics.py": ("test_metrics.py", "test_loop.py"),
    "training/export.py": ("test_export.py", "test_distributed.py"),
    "step2_reward/evaluate.py": ("test_reward_evaluation.py", "test_distributed.py"),
    "step3_ppo/rollout.py": ("test_ppo.py", "test_distributed.py"),
    "step3_ppo/ppo.py": ("test_ppo.py", "test_distributed.py"),
    "step3_ppo/models.py": ("test_ppo.py",),
    "step3_ppo/ema.py": ("test_ppo.py", "test_distributed.py"),
    "step3_ppo/check.py": ("test_ppo.py",),
    "step3_ppo/evaluate.py": ("test_ppo.py",),
    "step3_ppo/scoring.py": ("test_shared_prompts.py", "test_distributed.py", "test_ppo.py"),
    "step3_ppo/train.py": ("test_ppo.py",),
}

# File -> what is wrong -> (source text that stands there exactly once, what replaces it).
MUTATIONS: dict[str, dict[str, tuple[str, str]]] = {
    "training/masking.py": {
        "whitening uses the sample variance": (
            "variance = masked_mean((values.double() - mean).square(), mask)",
            "variance = masked_sum((values.double() - mean).square(), mask) / (mask.sum() - 1).clamp(min=1)",
        ),
        "a mean counts padding": (
            "masked_sum(values, mask, dim) / mask.sum(dim=dim).clamp(min=1)",
            "masked_sum(values, mask, dim) / torch.ones_like(mask).sum(dim=dim)",
        ),
        "the last token is found by counting tokens from column 0": (
            "return mask & (true_from_here_on == 1)",
            "return torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1",
        ),
    },
    "training/logprobs.py": {
        "a log-probability is taken at the token's own position": (
            "targets = input_ids[:, time - kept + 1 :]",
            "targets = input_ids[:, time - kept : -1]",
        ),
        "log-probabilities forget the temperature": (
            "_TokenLogprobs.apply(logits, targets, temperature)",
            "_TokenLogprobs.apply(logits, targets, 1.0)",
        ),
        "packed log-probabilities forget the temperature": (
            "_TokenLogprobs.apply(logits[None], tokens[None], temperature)",
            "_TokenLogprobs.apply(logits[None], tokens[None], 1.0)",
        ),
        "a packed log-probability is taken at the token's own position": (
            "return chosen, chosen - 1",
            "return chosen, chosen",
        ),
        "log-probabilities of a 16-bit model are computed in 16 bits": (
            "return tensor.to(torch.promote_types(tensor.dtype, torch.float32))",
            "return tensor",
        ),
        "the critic's value has seen the token that it judges": (
            "return F.pad(_at_least_float32(position_values[:, :-1]), (1, 0))",
            "return _at_least_float32(position_values)",
        ),
        "the score is read in the last column, padding or not": (
            "return torch.where(last_true(attention_mask), _at_least_float32(position_values), 0.0).sum(dim=1)",
            "return _at_least_float32(position_values)[:, -1]",
        ),
    },
    "training/advantages.py": {
        "GAE bootstraps from values in padding": (
            "next_values = torch.where(mask[:, t], values[:, t], next_values)",
            "next_values = values[:, t]",
        ),
        "RLOO's baseline includes the response itself": (
            "mean_of_others = (totals.sum(dim=1, keepdim=True) - totals) / (group_size - 1)",
            "mean_of_others = totals.mean(dim=1, keepdim=True)",
        ),
        "groups are interleaved rows, not consecutive ones": (
            ".view(-1, group_size)",
            ".view(group_size, -1).T",
        ),
    },
    "training/losses.py": {
        "importance weights are not cut": (".exp().clamp(max=most)", ".exp()"),
        "the policy loss is the better of unclipped and clipped": (
            "losses = torch.maximum(-advantages * ratio,",
            "losses = torch.minimum(-advantages * ratio,",
        ),
        "clip_low and clip_high are swapped": (
            "ratio.clamp(1 - clip_low, 1 + clip_high)",
            "ratio.clamp(1 - clip_high, 1 + clip_low)",
        ),
        "the dual clip bounds good tokens as well": (
            "torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)",
            "torch.minimum(losses, -advantages * dual_clip)",
        ),
        "the policy loss is a mean of the responses' means": (
            "return _divide(masked_sum(losses, mask), denominator)",
            "return (masked_sum(losses, mask, dim=1) / mask.sum(dim=1).clamp(min=1)).mean()",
        ),
        "the weight of the KL loss has a gradient": (
            "_log_ratio(logprobs.detach(), old_logprobs, mask)",
            "_log_ratio(logprobs, old_logprobs, mask)",
        ),
        "values are clipped around the returns": (
            "clipped = old_values + (values - old_values).clamp(-clip, clip)",
            "clipped = returns + (values - returns).clamp(-clip, clip)",
        ),
    },
    "training/rewards.py": {
        "the KL penalty is a bonus": ("score_on_last - kl_coefficient * kl", "score_on_last + kl_coefficient * kl"),
        "k3 has actor and reference swapped": (
            "return torch.expm1(-difference) + difference",
            "return torch.expm1(difference) - difference",
        ),
        "the score stands on every token": (
            "torch.where(last_true(mask), scores.unsqueeze(1), 0.0)",
            "torch.where(mask, scores.unsqueeze(1), 0.0)",
        ),
        "the adaptive KL coefficient's error is not clipped": (
            "error = min(max(kl / self.target - 1, -0.2), 0.2)",
            "error = kl / self.target - 1",
        ),
        "the adaptive KL coefficient falls where the KL is too high": (
            "self.coefficient *= 1 + error * num_samples / self.horizon",
            "self.coefficient *= 1 - error * num_samples / self.horizon",
        ),
    },
    "training/forward.py": {
        "the logits that choose the first response token are left out": (
            "kept = min(time, time - first + 1)",
            "kept = time - first",
        ),
    },
    "training/packing.py": {
        "positions count on from one packed row to the next": (
            "(real.cumsum(1) - 1).flatten()",
            "(real.flatten().cumsum(0) - 1)",
        ),
        "a packed model's attention keeps its own scale": (
            'AttentionRule(options.get("scaling"),',
            "AttentionRule(1.0,",
        ),
        "rows by their length are given back in another order": (
            "own = order[row] * self.shape[1] + column",
            "own = row * self.shape[1] + column",
        ),
        "padding is taken for a shared beginning": ("& real[1:] & real[:-1]", ""),
    },
    "training/attention.py": {
        "a branch sees the token after its own": ("seen = keys <= queries", "seen = keys <= queries + 1"),
        "the sliding window of a branch is one token too long": (
            "keys > queries - sliding_window",
            "keys >= queries - sliding_window",
        ),
        "packed tokens see what follows them": ("is_causal=mask is None", "is_causal=False"),
        "the sliding window of packed rows is one token too long": (
            "(distance < sliding_window)",
            "(distance <= sliding_window)",
        ),
    },
    "training/tokenization.py": {
        "EOS is not part of what is learnt": (
            "return ids if ids[-1:] == [eos_id] else [*ids, eos_id]",
            "return ids",
        ),
    },
    "training/data.py": {
        "masks are made by comparing ids with the pad token": (
            "attention_mask[row, :length] = True",
            "attention_mask[row] = input_ids[row] != pad_id",
        ),
        "every epoch has the same order": ("np.random.PCG64([seed, epoch])", "np.random.PCG64([seed, 0])"),
        "the examples that fill no whole step are never seen": (
            "math.ceil(num_examples * epochs / train_batch_size)",
            "math.floor(num_examples * epochs / train_batch_size)",
        ),
        "every rank trains on the same examples": (
            "for part in shares[rank]]",
            "for part in shares[0]]",
        ),
        "micro-batches may hold more tokens than their budget": (
            "while any(len(part) > 1 and sum(lengths[row] for row in part) > micro_batch_tokens for part in parts):",
            "while False:",
        ),
        "a rank without held-out data counts an example again": (
            "else collate_fn([dataset[0]]).as_filler()",
            "else collate_fn([dataset[0]])",
        ),
    },
    "training/models.py": {
        "dropout stays on": ("setattr(config, name, 0.0)", "setattr(config, name, value)"),
        "a new head has its variance for a deviation": (
            "std=1 / math.sqrt(model.score.in_features + 1)",
            "std=1 / (model.score.in_features + 1)",
        ),
        "weights that a folder lacks stay random in silence": (
            "if missing or unexpected or reshaped:",
            "if unexpected or reshaped:",
        ),
        "adapters are dropped in place of merged": (".merge_and_unload()", ".unload()"),
    },
    "training/generation/sampler.py": {
        "the sampler forgets the temperature": (
            "return draw_tokens(logits, uniforms, sampling.temperature)\n\n\n",
            "return draw_tokens(logits, uniforms)\n\n\n",
        ),
        "the sampler reports a logit as the log-probability": ("- sums.sum(-1, keepdim=True).log().float()", ""),
        "the draw within a block begins at the block's end": (
            "(sums.cumsum(-1) - sums).gather(-1, block)",
            "sums.cumsum(-1).gather(-1, block)",
        ),
        "within a block the logits are not divided by the temperature": (".float().div_(temperature)", ".float()"),
    },
    "training/generation/responses.py": {
        "EOS is cut off the response": (
            "Completion(tokens[:count], logprobs[:count], finished)",
            "Completion(tokens[: count - 1], logprobs[: count - 1], finished)",
        ),
        "a response ends wherever a stop sequence stands": (
            "found = found | same.all(1)",
            "found = found | same.any(1)",
        ),
        "EOS may be drawn one token too early": (
            "(drawn < self.sampling.min_new_tokens)",
            "(drawn + 1 < self.sampling.min_new_tokens)",
        ),
        "a row that is done draws on": ("drawn += running", "drawn += 1"),
        "a row that moves to another slot leaves its seed behind": (
            'STATE = ("tokens", "logprobs", "uniforms",',
            'STATE = ("tokens", "logprobs",',
        ),
        "a row that has not begun is asked for its newest token": ("(drawn - 1).clamp(min=0)", "drawn - 1"),
    },
    "training/generation/hf.py": {
        "positions count the padding on the left": (
            "(mask.cumsum(-1) - 1).clamp_(min=0)[:, -input_ids.shape[1] :]",
            "(torch.ones_like(mask).cumsum(-1) - 1)[:, -input_ids.shape[1] :]",
        ),
        "a row that moves up in the batch draws with its neighbour's seed": (
            "responses.keep(keep)",
            "responses.keep(torch.arange(len(keep)))",
        ),
    },
    "training/generation/decoder.py": {
        "every prompt begins at the position where the one before it ended": (
            "places = [place for ids, _ in prompts for place in range(len(ids))]",
            "places = list(range(len(ids)))",
        ),
        "a row that moves forgets how much of it is cached": (
            "self.newest[slot], self.lengths[slot] = self.newest[last], self.lengths[last]",
            "self.newest[slot] = self.newest[last]",
        ),
        "the cache of a row that is done grows on": (
            "self.lengths[:decoding] += ~self.responses.done(decoding)",
            "self.lengths[:decoding] += 1",
        ),
        "graphs outlive the place of the weights": (
            "self.graphs, self.weights = {}, weights",
            "self.weights = weights",
        ),
    },
    "training/generation/kv_cache.py": {
        "a new token does not look at itself": (
            "mask = position < seen[:, None]",
            "mask = position < (seen[:, None] - 1).clamp(min=1)",
        ),
        "the sliding window is one token too long": (
            "mask &= position >= seen[:, None] - sliding_window",
            "mask &= position >= seen[:, None] - sliding_window - 1",
        ),
        "a row that moves leaves its last token behind": (
            "rows[slot, :length] = rows[last, :length]",
            "rows[slot, : length - 1] = rows[last, : length - 1]",
        ),
        "memory behind a row's end may hold nan": (
            "value.new_zeros(self.num_places, value.shape[0], value.shape[2])",
            "value.new_full((self.num_places, *value.shape[::2]), float('nan'))",
        ),
    },
    "training/generation/paged_cache.py": {
        "the page where a prompt ends is shared": (
            "self._pages[twin][: pages_of(self.shared_tokens(prompt_tokens))]",
            "self._pages[twin][: pages_of(prompt_tokens)]",
        ),
        "a page is free while another row holds it": ("if not self._shared[page]:", "if True:"),
        "a row that moves takes no pages along": ("            self._write_table(slot)\n\n", "            pass\n\n"),
    },
    "training/generation/native.py": {
        "rows that have ended are told by their slots": (
            "rows = [self.running[slot] for slot in done]",
            "rows = list(done)",
        ),
    },
    "training/generation/lean_layers.py": {
        "weights that lie apart are taken for neighbours": ("or part.storage_offset() != expected:", "or False:"),
        "layers of a sliding window see everything": (
            "AttentionRule(attention.scaling, window)",
            "AttentionRule(attention.scaling)",
        ),
        "positions turn the wrong way": ("sine[..., :half], value=-1)", "sine[..., :half])"),
    },
    "training/optim.py": {
        "the first step of the warm-up has learning rate 0": (
            "return (step + 1) / warmup_steps",
            "return step / warmup_steps",
        ),
        "Adam's eps is not passed on": ("        eps=config.eps,\n", ""),
        "biases and norms decay": (
            '{"params": vectors, "weight_decay": 0.0}',
            '{"params": vectors, "weight_decay": weight_decay}',
        ),
    },
    "training/distributed.py": {
        "every rank has the same seed": ("seed = (seed + rank * 100003) % 2**32", "seed = seed % 2**32"),
    },
    "training/engine.py": {
        "gradients are averaged over ranks, not added": ("loss * world_size(), scale", "loss, scale"),
        "the loss is divided once more by the number of micro-batches": (
            "engine.backward(loss * world_size(), scale_wrt_gas=False)",
            "engine.backward(loss * world_size())",
        ),
        "gradients are not clipped": ('"gradient_clipping": config.gradient_clipping', '"gradient_clipping": 0.0'),
        "adapters stay merged after generating": (
            "            layer.get_base_layer().weight.data.copy_(weight)\n",
            "",
        ),
    },
    "training/loop.py": {
        "the loss is divided by the tokens of this rank": (
            "denominator = sum_over_ranks(torch.stack([count_fn(micro_batch) for micro_batch in micro_batches]).sum())",
            "denominator = torch.stack([count_fn(micro_batch) for micro_batch in micro_batches]).sum()",
        ),
        "the loss is a mean of the micro-batches' means": (
            "loss_fn(engine, micro_batch, denominator.clamp(min=1e-8))",
            "loss_fn(engine, micro_batch, count_fn(micro_batch).clamp(min=1e-8) * len(micro_batches))",
        ),
    },
    "training/engine_state.py": {
        "resume: float32 weights stay as they were loaded": (
            "if kind == MASTER or steps[name] > 0:",
            "if kind != MASTER and steps[name] > 0:",
        ),
        "resume: AdamW's means of the gradient begin at 0": (
            "                values.copy_(saved.read(kind, name, start, len(values)))",
            "                values.copy_(saved.read(kind, name, start, len(values)) * (kind != 'exp_avg'))",
        ),
        "resume: AdamW's means of the squares begin at 0": (
            "            if kind == MASTER or steps[name] > 0:\n",
            "            if kind != 'exp_avg_sq' and (kind == MASTER or steps[name] > 0):\n",
        ),
        "resume: AdamW counts its steps anew": ("torch.tensor(float(step), dtype", "torch.tensor(1.0, dtype"),
        "resume: the weights of the forward pass are not those that were saved": (
            "    _weights_from_masters(engine, saved)\n    _load_scalars",
            "    _load_scalars",
        ),
        "resume: the first step has the learning rate of the start": ('group["lr"] = rate', "pass"),
        "resume: the schedule begins anew": (
            'schedule.last_epoch, schedule._step_count = scalars["schedule_step"], scalars["schedule_step"] + 1',
            "pass",
        ),
        "resume: the loss scale begins anew": ("setattr(scaler, name, value)", "pass"),
        "resume: DeepSpeed counts its steps anew": ("setattr(engine, name, value)", "pass"),
    },
    "training/checkpoint.py": {
        "resume: Python's random numbers begin anew": ("random.setstate((variant, tuple(keys), gauss))", "pass"),
        "resume: NumPy's random numbers begin anew": (
            "np.random.set_state((kind, np.array(keys, np.uint32), *rest))",
            "pass",
        ),
        "resume: torch's random numbers begin anew": (
            'torch.set_rng_state(torch.tensor(saved["torch"], dtype=torch.uint8))',
            "pass",
        ),
        "resume: the best checkpoint is forgotten": ('"metric": state.metric,', '"metric": None,'),
        "resume: other training data are not noticed": (
            '{"digest of the training data": self._data}',
            '{"digest of the training data": ""}',
        ),
        "weights that are not finite are saved": ("if not torch.isfinite(values).all():", "if False:"),
        "a rank that could not write is not heard": ("        if text is not None:\n", "        if False:\n"),
    },
    "training/storage.py": {
        "files of a checkpoint do not wait for the disk": (
            "        sync(file)\n        records.append",
            "        records.append",
        ),
        "old checkpoints go before the newest is verified": ("        verify(root / names[-1])\n", "        pass\n"),
        "a good checkpoint is gone before another takes its name": (
            "    if _is_good(folder):\n        rename(folder, replaced)",
            "    if _is_good(folder):\n        remove_tree(folder)",
        ),
    },
    "training/manifest.py": {
        "a file's hash is not looked at": ("if found != record.sha256:", "if False:"),
        "a manifest's own hash is not looked at": ("    if found != expected:\n", "    if False:\n"),
    },
    "training/durable.py": {
        "a name is given without waiting for the disk": (
            "    os.rename(source, target)\n    sync(target.parent)",
            "    os.rename(source, target)",
        ),
        "a file gets its name before its bytes are on the disk": (
            "            os.fsync(descriptor)\n        finally:\n            os.close(descriptor)\n        rename",
            "            pass\n        finally:\n            os.close(descriptor)\n        rename",
        ),
        "a folder has no lock": ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    },
    "training/accounting.py": {
        "resume: what was computed since the last line is forgotten": (
            "return self._before + sums",
            "return sums",
        ),
    },
    "step3_ppo/progress.py": {
        "resume: the KL coefficient begins anew": (
            'result.controller.coefficient = values.pop("kl_coefficient")',
            'values.pop("kl_coefficient")',
        ),
        "resume: the updates of a rollout begin anew": (
            'result.updates = Updates(**values.pop("updates"))',
            'values.pop("updates")',
        ),
        "resume: held-out responses are drawn anew": (
            'result.before = [Sample(**sample) for sample in values.pop("before")]',
            'values.pop("before")',
        ),
        "resume: the rollout under way is forgotten": ("        if rest:\n", "        if False:\n"),
        "resume: the moving average begins anew": (
            "        if average is not None:\n            average.restore",
            "        if False:\n            average.restore",
        ),
        "resume: demonstrations begin anew": ('"actor_steps": self.actor_steps,', '"actor_steps": 0,'),
        "resume: iterations begin anew": ('"iteration": self.iteration,', '"iteration": 0,'),
        "resume: metrics of the rollout are forgotten": ('"metrics": self.metrics,', '"metrics": {},'),
    },
    "training/metrics.py": {
        "resume: tokens are counted anew": ('self.tokens = resumed["tokens"]', "self.tokens = 0"),
        "resume: lines after the checkpoint stay": ('cut_lines(self._path, resumed["bytes"])', "pass"),
        "the log shows the tokens of its last step for those so far": (
            "self.tokens += tokens",
            "self.tokens = tokens",
        ),
        "a run whose folder is gone goes on": ("if not self._path.exists():", "if False:"),
    },
    "training/export.py": {
        "the moving average is not what is saved": ("replacements.get(name, parameter)", "parameter"),
    },
    "step2_reward/evaluate.py": {
        "a tie counts as right": (
            "return self._mean([(d > 0) + 0.5 * (d == 0) for d in self.differences])",
            "return self._mean([float(d >= 0) for d in self.differences])",
        ),
        "normalising forgets that scores were normalised before": (
            "return gain / deviation, (bias - mean) / deviation",
            "return 1 / deviation, -mean / deviation",
        ),
    },
    "step3_ppo/rollout.py": {
        "the response mask is shifted by one": (
            "[False] * len(row.prompt_ids) + [True] * len(completion.response_ids)",
            "[False] * (len(row.prompt_ids) - 1) + [True] * len(completion.response_ids) + [False]",
        ),
        "the score for a missing EOS goes to responses that have one": (
            "torch.where(rollout.finished, scores, config.missing_eos_score)",
            "torch.where(rollout.finished, config.missing_eos_score, scores)",
        ),
        "the last rank leaves prompts out": (
            "share = distributed.own_share(len(prompts))",
            "share = distributed.own_share(len(prompts) // 2 * 2)",
        ),
        "all samples of a prompt are drawn with one seed": ("{stream}/{p}/{sample}", "{stream}/{p}"),
    },
    "step3_ppo/ppo.py": {
        "the order of rows is the same in every PPO epoch": (
            "np.random.default_rng((config.run.seed, iteration, epoch))",
            "np.random.default_rng((config.run.seed, iteration))",
        ),
        "PPO's loss is divided by the tokens of this rank": (
            "count = minibatch.batch.response_mask.sum()",
            "count = torch.stack([micro.batch.response_mask.sum() for micro in micros]).sum()",
        ),
        "PPO's loss is divided by the tokens of the micro-batch": (
            "actor_loss(models, micro, config, count)",
            "actor_loss(models, micro, config, micro.batch.response_mask.sum())",
        ),
        "the PTX loss is divided by the number of sampled tokens": (
            "ptx_loss(models, batch.to(count.device), ptx_count)",
            "ptx_loss(models, batch.to(count.device), count)",
        ),
        "PPO's metrics are those of one rank": (
            "totals = distributed.sum_over_ranks(torch.stack([sums[name].double() for name in names])).tolist()",
            "totals = torch.stack([sums[name].double() for name in names]).tolist()",
        ),
        "with demonstrations, the weights are updated before they are read": (
            "last = number == len(micros) and not demonstrations",
            "last = number == len(micros)",
        ),
        "a rank that has no rows trains on those of another": (
            "micro if counts else micro.as_filler()",
            "micro if counts else micro",
        ),
    },
    "step3_ppo/models.py": {
        "the reference is the actor with its adapter on": (
            "    with actor.module.disable_adapter():\n        yield actor",
            "    yield actor",
        ),
    },
    "step3_ppo/ema.py": {
        "the moving average has its decay inverted": (".float(), 1 - self.decay)", ".float(), self.decay)"),
        "the moving average is a view of the weights": (
            "_local(p).detach().float().clone()",
            "_local(p).detach().float()",
        ),
    },
    "step3_ppo/check.py": {
        "in the start-up check differences of both signs cancel": (
            "log_ratio.exp(), log_ratio.abs(), kl, kl.abs(), gap",
            "log_ratio.exp(), log_ratio, kl, kl, gap",
        ),
    },
    "step3_ppo/evaluate.py": {
        "a tie counts as a win": (
            "(b < a) + 0.5 * (b == a) for b, a",
            "float(b <= a) for b, a",
        ),
    },
    "step3_ppo/scoring.py": {
        "samples of a prompt are scattered over micro-batches": (
            "if not same_prompt or tokens + length > most_tokens:",
            "if length > 0:",
        ),
        "a rank's own scores are taken for those of all": (
            "return distributed.sum_over_ranks(result)\n\n    def count_passes",
            "return result\n\n    def count_passes",
        ),
        "what models say of a rollout keeps its graph": ("with torch.no_grad():", "with torch.enable_grad():"),
    },
    "step3_ppo/train.py": {
        "every iteration answers the same prompts": (
            "first = iteration * config.rollout_batch_size",
            "first = 0",
        ),
    },
}
