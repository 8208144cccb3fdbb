"""What ``kancompile --help`` and ``kancompile COMMAND --help`` say around the list of options."""

from __future__ import annotations

EXIT_CODES = """\
exit codes:
  0    done
  1    a threshold was missed; compile then writes nothing
  2    wrong input or usage; the message says what to change
  3    a bug in kancompile
  130  interrupted"""

MAIN = f"""\
Compile a trained Kolmogorov-Arnold Network (KAN) in PyTorch to a small quantized ONNX file that ONNX Runtime runs
with integer kernels, and prove that it still computes the same.

typical use:
  kancompile compile my_project.models:make_kan --checkpoint kan.safetensors --calibration train.npz --out build
  kancompile validate build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors --data test.npz
  kancompile benchmark build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors
  kancompile inspect build/model.onnx
  kancompile report build/model.onnx --against my_project.models:make_kan --checkpoint kan.safetensors --data train.npz

{EXIT_CODES}"""

COMPILE = """\
examples:
  kancompile compile models.py:make_kan --checkpoint kan.pt --calibration train.npz --out build
  kancompile compile pkg.nets:KAN --factory-arg layers=[784,64,10] --checkpoint kan.safetensors \\
      --calibration train.npz --weight-bits 4 --method gptq --min-sqnr 25 --out build
  kancompile compile model.pt2 --trust-model --calibration train.npz --recipe recipe.toml \\
      --layer layers.0 weight_bits=8 --out build

The calibration data is an .npz with an array 'x' [n, ...] of inputs scaled as in training (and, if you like, labels
'y'), an .npy, a folder of images (--calibration images --transform models.py:prepare; one subfolder for each class gives
labels), or a loader in your code (--calibration models.py:make_loader). A few hundred samples are enough.
A part of it is held out to measure the result. Writes OUT/model.onnx and OUT/model.manifest.json
(other targets: model.ort, model.c and model.h and so on, beside each other), all or none; where a threshold is missed
nothing is written but the report that --report asks for, OUT/model.missed.report.html."""

VALIDATE = """\
example:
  kancompile validate build/model.onnx --against models.py:make_kan --checkpoint kan.pt --data test.npz --max-drop 0.5

Runs the float model in PyTorch and the file in ONNX Runtime on the same data. With labels 'y' in the .npz it also
compares accuracy (integer labels) or R2 (float targets).

  kancompile validate build/model.onnx --data test.npz --runtime all

With --runtime it runs the file, and those of other targets beside it, in every runtime named, and compares their outputs with
those of ONNX Runtime; --against may then be left out. Runtimes that are not installed are listed with what installs them."""

BENCHMARK = """\
examples:
  kancompile benchmark build/model.onnx --against models.py:make_kan --checkpoint kan.pt --batch-sizes 1,256
  kancompile benchmark build/model.onnx --against models.py:make_kan --checkpoint kan.pt --runtime all

Times the compiled file, the float export of the model in ONNX Runtime, and PyTorch, in turns, on this machine. Close
other programs first: times of a busy machine mean little. --runtime adds runtimes that are installed; each takes the
file of its own target beside MODEL.onnx (litert: model.tflite, c99: model.c, ort-mobile: model.ort)."""

INSPECT = """\
examples:
  kancompile inspect build/model.onnx
  kancompile inspect --model models.py:make_kan --input-shape 784

The first form shows what a compiled file contains. The second shows which KAN layers are found in a model, and for
every other operation that was looked at why it stays as it is, with the line of code."""

DIAGNOSE = """\
example:
  kancompile diagnose models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --weight-bits 4

Lowers single layers and branches, divides their errors into range, levels, codes and weights, looks at the data, and ranks
what could be wrong, each with a change of the recipe or of the data, its predicted and its measured effect. Labels 'y' in the
.npz help to find wrong preprocessing. Writes nothing."""

TUNE = """\
example:
  kancompile tune models.py:make_kan --checkpoint kan.pt --calibration train.npz --data test.npz --max-drop 0.3 \\
      --weight-bits 4 --out build

Starts from the given recipe and makes the cheapest useful change first until --max-drop, --min-sqnr and --max-bytes are met;
then writes OUT/model.onnx, its manifest and OUT/recipe.toml. Otherwise says what is missing, and writes nothing but
OUT/tune-cache.jsonl, with which an interrupted run goes on where it was."""

REPORT = """\
examples:
  kancompile report build/model.onnx --against models.py:make_kan --checkpoint kan.pt --data train.npz
  kancompile report build/model.onnx --against models.py:make_kan --checkpoint kan.pt \\
      --calibration train.npz --data test.npz --edge layers.0:3,17 --out report.html

Writes one HTML page that opens offline, and its data as JSON: accuracy, size and time before and after, the error that every
layer and branch brings, ranges, kernels, and the edge functions before and after. The tables are made again from the data
that the file was compiled with, which is compared by hash: --calibration, or --data where that is the same file."""

RECIPE = """\
examples:
  kancompile recipe > recipe.toml
  kancompile recipe --recipe recipe.toml --weight-bits 4 --json

Prints the recipe that the given file and options amount to, with the meaning of every key."""

COMPLETION = """\
examples:
  kancompile completion bash > ~/.local/share/bash-completion/completions/kancompile
  kancompile completion zsh > ~/.zfunc/_kancompile
  kancompile completion fish > ~/.config/fish/completions/kancompile.fish

Completes commands, options and their choices. For zsh the folder must be in fpath before compinit runs."""
