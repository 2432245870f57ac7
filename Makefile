# make demo   the whole road on the built-in data: toy, tokenizer, DiT, samples, scores (about 12 minutes on two cores)
# make test   the tests (under 5 minutes)
# Both first make .venv and install requirements.txt into it, unless that has been done.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python toy2d.py --out $(DEMO)/toy2d
	$(BIN)/python train_tokenizer.py --loss ve --out $(DEMO)/tokenizer
	$(BIN)/python train_dit.py --tokenizer $(DEMO)/tokenizer/checkpoint.pt --out $(DEMO)/dit
	$(BIN)/python sample.py --dit $(DEMO)/dit/checkpoint.pt --out $(DEMO)/samples
	$(BIN)/python evaluate.py --tokenizer $(DEMO)/tokenizer/checkpoint.pt --samples $(DEMO)/samples/samples.npz --out $(DEMO)/evaluation
	@echo "pictures:"; ls $(DEMO)/toy2d/*.png $(DEMO)/tokenizer/images/*.png $(DEMO)/samples/grid.png

test: .venv/installed
	$(BIN)/python -m pytest -q --durations=10 test_*.py
