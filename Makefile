# `make demo` and `make test` set themselves up in .venv; nothing else is needed but Python 3.10 to 3.13.
# make prepare BIN=/my/env/bin: in an environment that has `pip install -e '.[dev]'` already
# make demo DATA=/my/scans ARGS="--valid 1": options of fastmiseg-demo (fastmiseg-demo --help has them all)
PYTHON ?= python3
BIN := .venv/bin
SETUP = $(if $(filter .venv/bin,$(BIN)),.venv/installed)
DATA ?=
ARGS ?=

.PHONY: help demo test prepare bench gpu gpu-carry docs clean

help:
	@echo 'make demo      the whole path on synthetic hearts; DATA=/my/scans: on yours'
	@echo 'make test      the notebooks and the tests'
	@echo 'make docs      the site, in _site/'
	@echo 'make prepare   after an edit: modules, clean notebooks, README, the table of rooms'
	@echo 'make bench     the measurements in benchmarks/'
	@echo 'make gpu       those that need a GPU; OUT=folder'
	@echo 'make gpu-carry what they need on a machine without network, in gpu-carry/; DATA=/my/acdc'
	@echo 'make clean     remove .venv and what was built'

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

demo: $(SETUP)
	$(BIN)/fastmiseg-demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 $(ARGS)
	@echo "done: all examples of the notebooks in nbs/ and all tests in tests/ passed, with the environment of $(BIN)"

prepare: $(SETUP)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/ruff check fastmiseg tests benchmarks docs
	$(BIN)/python tests/test_rooms.py
	rm -rf README_files
	$(BIN)/jupyter nbconvert nbs/index.ipynb --to markdown --output-dir . --output README --RegexRemovePreprocessor.patterns='^#\| hide'

bench: $(SETUP)
	for f in mutual_info step network; do OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/$$f.py || exit 1; done
	for f in data prepare metrics checksums; do (echo "Made by \`python benchmarks/$$f.py\`" && echo && $(BIN)/python -W ignore benchmarks/$$f.py) > benchmarks/$$f.tmp && mv benchmarks/$$f.tmp benchmarks/$$f.md || exit 1; done

gpu:
	bash benchmarks/gpu.sh $(if $(OUT),"$(OUT)",gpu-results)

gpu-carry: $(SETUP)
	$(BIN)/python -W ignore benchmarks/gpu_carry.py gpu-carry $(if $(DATA),"$(DATA)")

docs: $(SETUP)
	$(BIN)/python docs/build.py

clean:
	rm -rf .venv build *.egg-info _proc _site
