# Every room is `python -m <room> --recipe R --run RUN`; this file only names them and brings up the environment.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PY := $(VENV)/bin/python

# What a user may type behind a target. Only what is typed counts, not a PROMPT or a PORT that the shell exports, which
# reaches commands as the shell has it. It arrives as it was typed: `$(value ...)` keeps make from reading `$`, and
# commands take it from the environment, so that the shell reads no quotes, spaces or `#` in it.
TYPED := RECIPE RUN STAGE PHASE PLAN SET SHARDS RETRY SETS SAMPLE GPUS HOSTFILE REMOTE_SHELL FROM_SCRATCH \
	PROMPT PROMPTS N STEPS CFG SEED SIZE TASK REFERENCE CLIP INCEPTION PORT FROM TO REPARAMETERIZE PARTS TINY
MAY_BE_EMPTY := SET PLAN RETRY FROM_SCRATCH REPARAMETERIZE TINY
GIVEN := $(foreach name,$(TYPED),$(if $(filter command,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(MAY_BE_EMPTY),$(GIVEN)),$(if $(strip $(value $(name))),, \
	$(error $(name) is empty: type a value, or leave $(name)= out)))
$(if $(filter demo demo-raw,$(MAKECMDGOALS)),$(foreach name,$(filter RECIPE RUN STAGE,$(GIVEN)), \
	$(error the demo has a RECIPE, a RUN and stages of its own: leave $(name)= out)))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
given = $(if $(filter $1,$(GIVEN)),$($1))
override RECIPE := $(or $(call given,RECIPE),recipes/pixart-alpha.toml)
override RUN := $(or $(call given,RUN),runs/default)
export RECIPE RUN $(GIVEN)

# The targets of a line are steps, each of which reads what the ones before it have written.
.NOTPARALLEL:

# `--set` reads its value as TOML, `--settings` several of them, `--text` takes its value as it is.
is_on = $(filter-out 0,$(call given,$1))
FLAGS = --recipe "$$RECIPE" --run "$$RUN" $(if $(call is_on,PLAN),--plan) $(if $(call given,SET),--settings "$$SET")
STAGE_FLAGS = --stage "$$STAGE" $(if $(call given,PHASE),--phase "$$PHASE")
DATA_FLAGS = $(if $(call given,SHARDS),--text "data.shards=$$SHARDS")
CAPTION_FLAGS = $(if $(call is_on,RETRY),--set captioning.retry_rejects=true)
TRAIN_FLAGS = $(if $(call given,GPUS),--set "training.num_processes=$$GPUS") $(if $(call given,HOSTFILE),--text "training.hostfile=$$HOSTFILE") \
	$(if $(call given,REMOTE_SHELL),--text "training.remote_shell=$$REMOTE_SHELL") \
	$(if $(call is_on,FROM_SCRATCH),--set 'training.{stage}.starts_from=scratch')
SAMPLE_FLAGS = $(if $(call given,PROMPT),--text "sampling.prompt=$$PROMPT") $(if $(call given,PROMPTS),--text "sampling.prompts=$$PROMPTS") \
	$(if $(call given,N),--set "sampling.images_per_prompt=$$N") $(if $(call given,STEPS),--set "sampling.num_steps=$$STEPS") \
	$(if $(call given,CFG),--set "sampling.guidance_scale=$$CFG") $(if $(call given,SEED),--set "sampling.seed=$$SEED") \
	$(if $(call given,SIZE),--text "sampling.size=$$SIZE")
EVAL_FLAGS = $(if $(call given,REFERENCE),--text "evaluation.reference=$$REFERENCE") $(if $(call given,CLIP),--text "evaluation.clip=$$CLIP") \
	$(if $(call given,INCEPTION),--text "evaluation.inception=$$INCEPTION")
STATS_FLAGS = $(if $(call given,SETS),--text "dataset_stats.sets=$$SETS") $(if $(call given,SAMPLE),--set "dataset_stats.sample=$$SAMPLE") \
	$(if $(call given,SEED),--set "dataset_stats.seed=$$SEED")

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  Variables: RUN=runs/name RECIPE=recipes/x.toml STAGE=2|3|<name> PHASE=512|1024 PLAN=1 SET='table.key=value …'"
	@echo "             SHARDS='…' SETS='…' SAMPLE=n PROMPT='…' PROMPTS=file GPUS=n HOSTFILE=file N=… STEPS=… CFG=… SEED=… SIZE=WxH FROM_SCRATCH=1 RETRY=1"
	@echo "             TASK=score|curve|preference|winrates REFERENCE='…' CLIP=… INCEPTION=… PORT=n FROM=… TO=… REPARAMETERIZE=1 PARTS=a,b TINY=1"
	@echo "  They count when they are typed, behind the target, and reach the command as typed: with spaces, quotes, \$$ and #."
	@echo "  SET holds any number of table.key=value: numbers, true, [lists] and \"strings\" as in the recipe, other text as it is."
	@echo "  demo and demo-raw have a RECIPE, a RUN and stages of their own; the rest, SET too, counts in each of their steps."

$(READY): requirements.lock
	@echo "make: installing the packages that requirements.lock pins into $(VENV); this takes a minute or two" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --disable-pip-version-check -r requirements.lock >$(VENV)/pip.log 2>&1 \
		|| { tail -n 20 $(VENV)/pip.log >&2; echo "make: pip has failed; all it said is in $(VENV)/pip.log" >&2; exit 1; }
	@touch $(READY)

# -- the demo ---------------------------------------------------------------------------------------------------------

DEMO := --no-print-directory RECIPE=recipes/toyworld.toml RUN=runs/demo

.PHONY: demo
demo: $(READY)  ## Everything on the toy world: captions, statistics, features, three stages, samples, one page
	@$(MAKE) $(DEMO) world caption stats
	@set -e; for stage in 1 2 3; do $(MAKE) $(DEMO) features train sample STAGE=$$stage; done
	@$(MAKE) $(DEMO) judge
	@set -e; for stage in 2 3; do $(MAKE) $(DEMO) eval STAGE=$$stage; done
	@$(MAKE) $(DEMO) report

# SA-1B has no text of its own, so alt texts exist for the LAION-like half only. The demo's page then shows both runs.
RAW := --no-print-directory RECIPE=recipes/toyworld.toml RUN=runs/demo-raw \
	SET='features.stage2.captions=[{column="alt_text"}] features.stage2.shards=["laion_*"]'$(if $(call given,SET),' '"$$SET")

.PHONY: demo-raw
demo-raw: demo  ## The demo's stage 2 once more, on alt texts instead of dense captions
	@mkdir -p runs/demo-raw/training
	@for part in raw captions training/stage1; do ln -sfn $(CURDIR)/runs/demo/$$part runs/demo-raw/$$part; done
	@$(MAKE) $(RAW) features train sample STAGE=2
	@$(MAKE) $(RAW) judge report
	@$(MAKE) $(DEMO) report

.PHONY: world
world: $(READY)  ## Write the toy world's raw shards, their truth and the prompts
	@$(PY) -m toyworld world $(FLAGS)

.PHONY: judge
judge: $(READY)  ## Score captions and samples against the toy world's truth
	@$(PY) -m toyworld judge $(FLAGS)

.PHONY: report
report: $(READY)  ## Write the run's index.html
	@$(PY) -m toyworld report $(FLAGS)

.PHONY: zoo
zoo: $(READY)  ## Train the embedded toy models anew (about an hour on two cores)
	@$(PY) -m toyworld.zoo

# -- the rooms --------------------------------------------------------------------------------------------------------

.PHONY: caption
caption: $(READY)  ## Raw shards -> captions (SHARDS='/data/sa_{000000..000999}.tar')
	@$(PY) -m captioning $(FLAGS) $(DATA_FLAGS) $(CAPTION_FLAGS)

.PHONY: stats
stats: $(READY)  ## Captions -> noun statistics and report.html (SETS='name=files#column,…' SAMPLE=10000 SEED=0)
	@$(PY) -m dataset_stats $(FLAGS) $(DATA_FLAGS) $(STATS_FLAGS)

.PHONY: features
features: $(READY) need-stage  ## Captions and images -> T5 and VAE features (STAGE=2)
	@$(PY) -m features $(FLAGS) $(STAGE_FLAGS) $(DATA_FLAGS)

.PHONY: buckets
buckets: $(READY) need-stage  ## Images per aspect bucket, crop, upscaling and rejects, from headers alone (STAGE=3)
	@$(PY) -m features.buckets $(FLAGS) $(STAGE_FLAGS) $(DATA_FLAGS)

.PHONY: verify
verify: $(READY)  ## Read every file of a run to its end, say what is damaged and what to do about it
	@$(PY) -m pipelines.store.verify --run "$$RUN"

.PHONY: train
train: $(READY) need-stage  ## Features -> checkpoints (STAGE=2 GPUS=8, or HOSTFILE=hosts)
	@$(PY) -m training $(FLAGS) $(STAGE_FLAGS) $(DATA_FLAGS) $(TRAIN_FLAGS)

.PHONY: convert
convert: $(READY) need-source  ## Published weights -> a diffusers folder (FROM=… TO=… REPARAMETERIZE=1 turns a DiT into a PixArt)
	@$(PY) -m training.convert "$$FROM" "$$TO" $(if $(call is_on,REPARAMETERIZE),--reparameterize)

.PHONY: sample
sample: $(READY) need-stage  ## Checkpoint and prompts -> images (STAGE=2 PROMPT='…')
	@$(PY) -m sampling $(FLAGS) $(STAGE_FLAGS) $(SAMPLE_FLAGS)

.PHONY: eval
eval: $(READY) need-stage  ## Scores, each with its inputs (STAGE=2 TASK=score|curve|preference|winrates)
	@$(PY) -m sampling.evaluation $(if $(call given,TASK),"$$TASK",score) $(FLAGS) $(STAGE_FLAGS) $(SAMPLE_FLAGS) $(EVAL_FLAGS)

.PHONY: app
app: $(READY) need-stage  ## A local page to draw from a checkpoint (STAGE=2 PORT=7860)
	@$(PY) -m sampling.app $(FLAGS) $(STAGE_FLAGS) $(SAMPLE_FLAGS) $(if $(call given,PORT),--set "app.port=$$PORT")

.PHONY: nltk-data
nltk-data: $(READY)  ## Fetch NLTK's tagger once, checksummed
	@$(PY) -m dataset_stats.tagging.nltk_data

.PHONY: need-source
need-source:
	@$(if $(and $(call given,FROM),$(call given,TO)),:,echo "make: say which, for example FROM=facebook/DiT-XL-2-256 TO=dit" >&2; exit 2)

.PHONY: need-stage
need-stage:
	@$(if $(call given,STAGE),:,echo "make: say which stage, for example STAGE=2" >&2; exit 2)

# -- quality ----------------------------------------------------------------------------------------------------------

.PHONY: test
test: $(READY)  ## Run all tests but the campaigns of test-faults
	@$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test-faults
test-faults: $(READY)  ## Campaigns of kill -9, of dying nodes and of disks that fill up
	@$(VENV)/bin/pytest -m faults

.PHONY: check
check: $(READY)  ## Lint, formatting, types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright

# All but that of the cache, which reads a finished demo.
BENCHMARKS := $(patsubst benchmarks/%.py,bench-%,$(filter-out benchmarks/__init__.py benchmarks/cache.py,$(wildcard benchmarks/*.py)))

.PHONY: bench $(BENCHMARKS)
bench: $(BENCHMARKS)  ## Run every benchmark that needs no demo (make bench-stats runs one)

$(BENCHMARKS): bench-%: $(READY)
	@$(PY) -m benchmarks.$*

.PHONY: bench-cache
bench-cache: $(READY)  ## Fewer block evaluations an image against points of the judge, of a finished demo (RUN=runs/demo)
	@$(PY) -m benchmarks.cache $(if $(call given,RUN),--run "$$RUN")

.PHONY: bench-gpu
bench-gpu: $(READY)  ## One CUDA device against what others do on it (PARTS=loop_256,caption_7b; TINY=1 on a CPU)
	@$(PY) -m benchmarks.gpu $(if $(call given,PARTS),"$$PARTS") $(if $(call is_on,TINY),--tiny)
