# Brings up the environment and opens the doors of `atelier`, which knows what each of them takes: atelier/commands.py.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PY := $(VENV)/bin/python

DOORS := init recipe caption claims columns choose stats features buckets pack verify train convert sample eval app world judge subject detect edges follow spoil vote report paper-page nltk-data
# All but that of the cache, which reads a finished demo, and that of quality, which trains for an hour.
BENCHMARKS := $(patsubst benchmarks/%.py,bench-%,$(filter-out $(addprefix benchmarks/,__init__.py cache.py quality.py),$(wildcard benchmarks/*.py)))
TARGETS := help demo demo-paper demo-raw demo-dreambooth demo-vae demo-control demo-lcm demo-curation paper $(DOORS) zoo test test-faults check bench $(BENCHMARKS) bench-cache bench-quality bench-gpu
.PHONY: $(TARGETS)
.DEFAULT_GOAL := help
# The targets of a line are steps, each of which reads what the ones before it have written.
.NOTPARALLEL:
# The folder of the house is the working folder here, and first where Python looks for modules.
unexport PYTHONSAFEPATH

# What is typed is refused before anything starts where a target would lose it: atelier/typed.py reads it as the shell
# has handed it over.
TYPED_WRONG := $(shell PYTHONSAFEPATH= $(or $(wildcard $(PY)),$(PYTHON)) -m atelier.typed $$PPID $(TARGETS) $(READY))
$(if $(TYPED_WRONG),$(error $(TYPED_WRONG)))

# Only what is typed counts, not a PROMPT or a PORT that the shell exports, which reaches commands as the shell has it. It
# arrives as it was typed: `$(value ...)` keeps make from reading `$`, and commands take it from the environment, so that
# the shell reads no quotes, spaces or `#` in it.
GIVEN := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)
given = $(if $(filter $1,$(GIVEN)),$($1))

help:  ## Show this list
	@$(or $(wildcard $(PY)),$(PYTHON)) -m atelier.typed --help Makefile

$(READY): requirements.lock
	@echo "make: installing the packages that requirements.lock pins into $(VENV); this takes a minute or two" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --disable-pip-version-check -r requirements.lock >$(VENV)/pip.log 2>&1 \
		|| { tail -n 20 $(VENV)/pip.log >&2; echo "make: pip has failed; all it said is in $(VENV)/pip.log" >&2; exit 1; }
	@$(PY) -m dataset_stats.tagging.nltk_data --if-reachable
	@touch $(READY)

# -- the doors --------------------------------------------------------------------------------------------------------

$(DOORS): $(READY)
	@$(PY) -m atelier $@ --from-make "$(GIVEN)"

zoo: $(READY)  ## Train the embedded toy models anew (an hour and a half on two cores)
	@$(PY) -m toyworld.zoo

# -- the demo ---------------------------------------------------------------------------------------------------------

DEMO := --no-print-directory RECIPE=recipes/toyworld.toml RUN=runs/demo
BY_PAPER := --no-print-directory RECIPE=recipes/toyworld-paper.toml RUN=runs/demo-paper

# $1: the recipe and the run.
define everything
@$(MAKE) $1 world caption stats
@set -e; for stage in 1 2 3; do $(MAKE) $1 features train sample STAGE=$$stage; done
@$(MAKE) $1 judge
@set -e; for stage in 2 3; do $(MAKE) $1 eval STAGE=$$stage; done
@$(MAKE) $1 report
endef

demo: $(READY)  ## Everything on the toy world: captions, statistics, features, three stages, samples, one page
	$(call everything,$(DEMO))

demo-paper: $(READY)  ## The demo with the paper's own recipe of training
	$(call everything,$(BY_PAPER))

# SA-1B has no text of its own, so alt texts exist for the LAION-like half only. The demo's page then shows both runs.
RAW := --no-print-directory RECIPE=recipes/toyworld.toml RUN=runs/demo-raw \
	SET='features.stage2.captions=[{column="alt_text"}] features.stage2.shards=["laion_*"]'$(if $(call given,SET),' '"$$SET")

demo-raw: demo  ## The demo's stage 2 once more, on alt texts instead of dense captions
	@mkdir -p runs/demo-raw/training
	@for part in raw captions training/stage1; do ln -sfn $(CURDIR)/runs/demo/$$part runs/demo-raw/$$part; done
	@$(MAKE) $(RAW) features train sample STAGE=2
	@$(MAKE) $(RAW) judge report
	@$(MAKE) $(DEMO) report

DREAMBOOTH := --no-print-directory RECIPE=recipes/toyworld-dreambooth.toml RUN=runs/demo-dreambooth
# Images of before it learns anything lie in a run of their own, which draws from the weights that training starts from.
PRIOR := --no-print-directory RECIPE=recipes/toyworld-dreambooth.toml RUN=runs/demo-dreambooth/prior
FROM_BEFORE := SET='sampling.checkpoint=toyworld/released/pixart'$(if $(call given,SET),' '"$$SET")

demo-dreambooth: $(READY)  ## DreamBooth on the toy world: a new shape from eight images, before and after
	@$(MAKE) $(DREAMBOOTH) subject
	@$(MAKE) $(PRIOR) sample STAGE=prior PROMPTS=runs/demo-dreambooth/raw/prior.jsonl $(FROM_BEFORE)
	@$(MAKE) $(PRIOR) sample STAGE=before PROMPTS=runs/demo-dreambooth/raw/prompts.jsonl $(FROM_BEFORE)
	@$(MAKE) $(PRIOR) caption features STAGE=prior SHARDS=runs/demo-dreambooth/prior/samples/prior/samples.parquet
	@$(MAKE) $(DREAMBOOTH) caption features STAGE=dreambooth SHARDS=runs/demo-dreambooth/raw/subject
	@set -e; for stage in dreambooth dreambooth-lora; do \
		$(MAKE) $(DREAMBOOTH) train sample STAGE=$$stage PROMPTS=runs/demo-dreambooth/raw/prompts.jsonl; done
	@$(MAKE) $(DREAMBOOTH) detect

OTHER_VAE := --no-print-directory RECIPE=recipes/toyworld-vae.toml RUN=runs/demo-vae

demo-vae: $(READY)  ## Another VAE on the toy world: what the judge says while the weights re-align
	@$(MAKE) $(OTHER_VAE) world caption
	@set -e; for stage in former vae; do $(MAKE) $(OTHER_VAE) features STAGE=$$stage; done
	@$(MAKE) $(OTHER_VAE) train STAGE=vae
	@$(MAKE) $(OTHER_VAE) sample STAGE=former \
		SET='sampling.checkpoint=toyworld/released/pixart sampling.size=64x64'$(if $(call given,SET),' '"$$SET")
	@set -e; for step in 50 100 150 200 250 300 350 400; do $(MAKE) $(OTHER_VAE) sample STAGE=vae-$$step \
		SET='sampling.checkpoint=runs/demo-vae/training/vae/step-'$$step$(if $(call given,SET),' '"$$SET"); done
	@$(MAKE) $(OTHER_VAE) judge report

CONTROL_RUN := --no-print-directory RECIPE=recipes/toyworld-control.toml RUN=runs/demo-control
# What the weights draw without the branch lies in a run of its own, as that of before DreamBooth does.
ALONE := --no-print-directory RECIPE=recipes/toyworld-control.toml RUN=runs/demo-control/alone

demo-control: $(READY)  ## A control branch on the toy world: shapes and places by edges, colours by prompts
	@$(MAKE) $(CONTROL_RUN) edges caption
	@$(MAKE) $(CONTROL_RUN) features train sample STAGE=control
	@$(MAKE) $(ALONE) sample STAGE=alone PROMPTS=runs/demo-control/raw/prompts-alone.jsonl $(FROM_BEFORE)
	@$(MAKE) $(CONTROL_RUN) follow

LCM := --no-print-directory RECIPE=recipes/toyworld-lcm.toml RUN=runs/demo-lcm
# The weights that it begins from; of other weights than a student's, nobody's recipe says how they are drawn.
UNTRAINED := sampling.checkpoint=toyworld/released/pixart sampling.size=64x64
STUDENT := sampling.checkpoint=runs/demo-lcm/training/lcm
BY_LCM := sampling.solver=lcm sampling.guidance_scale=1
TYPED_SET = $(if $(call given,SET),' '"$$SET")

demo-lcm: $(READY)  ## Few steps on the toy world: a student of 1 to 8, beside its teacher of 20
	@$(MAKE) $(LCM) world caption
	@$(MAKE) $(LCM) features train STAGE=lcm
	@$(MAKE) $(LCM) sample STAGE=teacher SET='$(UNTRAINED)'$(TYPED_SET)
	@set -e; for steps in 1 2 4 8; do \
		$(MAKE) $(LCM) sample STAGE=student-$$steps STEPS=$$steps SET='$(STUDENT)'$(TYPED_SET); \
		$(MAKE) $(LCM) sample STAGE=untrained-$$steps STEPS=$$steps SET='$(UNTRAINED) $(BY_LCM)'$(TYPED_SET); done
	@$(MAKE) $(LCM) sample STAGE=student-from-599 SET='$(STUDENT) sampling.times=[599]'$(TYPED_SET)
	@$(MAKE) $(LCM) sample STAGE=untrained-from-599 SET='$(UNTRAINED) $(BY_LCM) sampling.times=[599]'$(TYPED_SET)
	@set -e; for end in least=1 most=5; do for drawn in 'teacher $(UNTRAINED)' 'student $(STUDENT)'; do \
		$(MAKE) $(LCM) sample STAGE=$${drawn%% *}-$${end%=*} CFG=$${end#*=} \
			SET="$${drawn#* } sampling.max_prompts=100"$(TYPED_SET); done; done
	@$(MAKE) $(LCM) judge report

CURATION := --no-print-directory RECIPE=recipes/toyworld-curation.toml RUN=runs/demo-curation

demo-curation: $(READY)  ## A choice on the toy world: trained on spoilt samples, on what is chosen of them, on the sound ones
	@$(MAKE) $(CURATION) spoil caption columns
	@set -e; for stage in all chosen sound; do $(MAKE) $(CURATION) features train sample STAGE=$$stage; done
	@$(MAKE) $(CURATION) judge report

# -- the paper --------------------------------------------------------------------------------------------------------

# A part is a recipe and the doors that it goes through, here for seed $1 of the trainings. All seeds read one world.
PARTS_OF_PAPER := start adaln captions tokens scales samplers guidance preference
CHOSEN_PARTS := $(or $(call given,PART),$(PARTS_OF_PAPER))
$(if $(filter-out $(PARTS_OF_PAPER),$(CHOSEN_PARTS)),$(error the paper has no part $(PART): its parts are $(PARTS_OF_PAPER)))
SEEDS_OF_PAPER = $(wordlist 1,$(or $(call given,SEEDS),1),0 1 2 3 4 5 6 7 8 9)
PAPER_WORLD := --no-print-directory RECIPE=recipes/paper/world.toml RUN=runs/paper/world
of = $(MAKE) --no-print-directory RECIPE=recipes/paper/$1.toml RUN=runs/paper/seed-$2
SEEDED = SET='training.seed=$1'$(TYPED_SET)
STEP_OF = SET='sampling.checkpoint=runs/paper/seed-$1/training/$2/step-'$$step$(TYPED_SET)

define paper-main
@mkdir -p runs/paper/world/features runs/paper/seed-$1
@set -e; for part in raw captions features; do ln -sfn ../world/$$part runs/paper/seed-$1/$$part; done
@$(call of,world,$1) features train sample judge eval STAGE=main $(SEEDED)
@$(call of,world,$1) sample STAGE=main-400 SET='sampling.checkpoint=runs/paper/seed-$1/training/main/step-400'$(TYPED_SET)
endef

define paper-start
@$(call of,start,$1) features train STAGE=classes $(SEEDED)
@set -e; for stage in from-classes scratch; do $(call of,start,$1) features train sample judge eval STAGE=$$stage $(SEEDED); done
@set -e; for step in 500 900; do $(call of,start,$1) sample STAGE=from-classes-$$step $(call STEP_OF,$1,from-classes); done
@set -e; for step in 400 800 1200 1400 1500; do $(call of,start,$1) sample STAGE=scratch-$$step $(call STEP_OF,$1,scratch); done
endef

define paper-adaln
@$(call of,adaln,$1) features train sample judge eval STAGE=per-block $(SEEDED)
endef

define paper-captions
@set -e; for stage in dense raw; do $(call of,captions,$1) features train sample judge eval STAGE=$$stage $(SEEDED); done
endef

define paper-tokens
@set -e; for stage in tokens-43 tokens-16; do $(call of,tokens,$1) features train sample judge eval STAGE=$$stage $(SEEDED); done
endef

define paper-scales
@set -e; for stage in multi-scale square; do \
	$(call of,scales,$1) features train STAGE=$$stage $(SEEDED); \
	for size in 80x80 96x64 64x96; do $(call of,scales,$1) sample STAGE=$$stage-$$size SIZE=$$size \
		SET='sampling.checkpoint=runs/paper/seed-$1/training/'$$stage$(TYPED_SET); done; done
endef

define paper-samplers
@set -e; for solver in iddpm dpm-solver++ sa-solver; do for steps in 5 10 20 50 100; do \
	$(call of,drawing,$1) sample STAGE=$${solver%++}-in-$$steps STEPS=$$steps \
	SET='sampling.checkpoint=runs/paper/seed-$1/training/main sampling.solver='$$solver$(TYPED_SET); done; done
endef

define paper-guidance
@$(call of,drawing,$1) eval STAGE=main TASK=curve
@$(call of,drawing,$1) judge
@$(call of,drawing,$1) eval STAGE=main TASK=curve
endef

define paper-preference
$(call paper-captions,$1)
@$(call of,captions,$1) eval STAGE=dense TASK=preference SET='evaluation.compare=["runs/paper/seed-$1:raw"]'$(TYPED_SET)
@$(call of,captions,$1) judge vote
@$(call of,captions,$1) eval STAGE=dense TASK=winrates
endef

define paper-end
@$(call of,world,$1) judge
@$(MAKE) --no-print-directory RECIPE=recipes/paper/world.toml RUN=runs/paper paper-page

endef
paper-line = $(call paper-$1,$2)$(newline)
define newline


endef

paper: $(READY)  ## The paper's claims in miniature and a page of them, an hour and a half (PART=adaln for one part, SEEDS=3)
	@$(MAKE) $(PAPER_WORLD) world caption stats judge
	$(foreach seed,$(SEEDS_OF_PAPER),$(foreach part,main $(CHOSEN_PARTS) end,$(call paper-line,$(part),$(seed))))

# -- quality ----------------------------------------------------------------------------------------------------------

test: $(READY)  ## Run all tests but the campaigns of test-faults
	@$(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-faults: $(READY)  ## Campaigns of kill -9, of dying nodes and of disks that fill up
	@$(VENV)/bin/pytest -m faults

check: $(READY)  ## Lint, formatting, types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright

bench: $(BENCHMARKS)  ## Run every benchmark that needs no demo (make bench-stats runs one)

$(BENCHMARKS): bench-%: $(READY)
	@$(PY) -m benchmarks.$*

bench-cache: $(READY)  ## Fewer block evaluations an image against points of the judge, of a finished demo (RUN=runs/demo)
	@$(PY) -m benchmarks.cache $(if $(call given,RUN),--run "$$RUN")

bench-quality: $(READY)  ## Steps and seconds until the judge is content: the paper's recipe against the demo's, an hour (SEEDS=3)
	@$(PY) -m benchmarks.quality $(if $(call given,SEEDS),--seeds "$$SEEDS")

bench-gpu: $(READY)  ## One CUDA device against what others do on it (PARTS=loop_256,caption_7b; TINY=1 on a CPU)
	@$(PY) -m benchmarks.gpu $(if $(call given,PARTS),"$$PARTS") $(if $(filter-out 0,$(call given,TINY)),--tiny)
