use super::*;

fn digits(overrides: &[&str]) -> Result<Recipe> {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    Recipe::load("mae_digits", &overrides)
}

fn message(result: Result<Recipe>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn every_builtin_recipe_parses_and_survives_writing() {
    for (name, _) in BUILTIN {
        let recipe = Recipe::load(name, &[]).unwrap();
        let again = Recipe::parse(Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(recipe, again, "{name}");
    }
}

/// mae.md's table: the peak learning rates that the paper's repository names for its batch sizes.
#[test]
fn the_papers_recipes() {
    for (name, lr, batch) in [
        ("mae_pretrain_vit_base", 2.4e-3, 4096),
        ("mae_finetune_vit_base", 2e-3, 1024),
        ("mae_finetune_vit_large", 4e-3, 1024),
        ("mae_linear_probe_vit_base", 6.4, 16384),
        ("moco_v1_resnet50", 0.03, 256),
        ("moco_cifar10", 0.06, 512),
        ("moco_linear_probe_resnet50", 30.0, 256),
        ("moco_v3_vit_base", 2.4e-3, 4096),
        ("moco_v3_resnet50", 9.6, 4096),
        ("moco_v3_linear_probe_vit_small", 12.0, 1024),
        ("simsiam_resnet50", 0.1, 512),
        ("simsiam_linear_probe_resnet50", 1.6, 4096),
        ("flip_vit_large", 1.024e-3, 65536),
        ("flip_tune_vit_large", 1.024e-5, 65536),
    ] {
        let recipe = Recipe::load(name, &[]).unwrap();
        assert!((recipe.peak_lr() / lr - 1.0).abs() < 1e-9, "{name}: {}", recipe.peak_lr());
        assert_eq!(recipe.effective_batch(), batch, "{name}");
    }
    let huge = Recipe::load("mae_pretrain_vit_huge", &[]).unwrap();
    let dims = huge.model.dims().unwrap();
    assert_eq!((dims.patch_size, dims.embed_dim, dims.depth, dims.num_heads), (14, 1280, 32, 16));
    assert_eq!(
        (huge.optim.betas, huge.schedule.epochs, huge.schedule.warmup_epochs),
        ([0.9, 0.95], 1600, 40.0)
    );
}

/// The networks of the papers' recipes are those of the models' own presets.
#[test]
fn the_papers_networks() -> Result<()> {
    for name in ["vit_small", "vit_base", "vit_conv_small", "vit_conv_base", "resnet50"] {
        let recipe = Recipe::load(&format!("moco_v3_{name}"), &[])?;
        let preset = crate::moco_v3::MocoV3Config::preset(name).unwrap();
        assert_eq!(recipe.backbone()?, preset.backbone, "{name}");
        let numbers = recipe.moco_v3.unwrap();
        assert_eq!((numbers.dim, numbers.mlp_dim), (preset.dim, preset.mlp_dim), "{name}");
        assert_eq!(numbers.temperature, preset.temperature, "{name}");
    }
    for (name, depth) in [("moco_v1_resnet50", 50), ("moco_v2_resnet50", 50)] {
        assert_eq!(Recipe::load(name, &[])?.resnet()?, ResNetConfig::preset(depth).unwrap());
    }
    for (name, preset) in [("simsiam_resnet50", "imagenet"), ("simsiam_cifar10", "cifar")] {
        let preset = crate::simsiam::SimSiamConfig::preset(preset).unwrap();
        assert_eq!(Recipe::load(name, &[])?.resnet()?, preset.backbone, "{name}");
    }
    for size in ["base", "large", "huge"] {
        let recipe = Recipe::load(&format!("flip_vit_{size}"), &[])?;
        assert_eq!(recipe.flip()?, FlipConfig::official(size).unwrap());
    }
    Ok(())
}

#[test]
fn overrides_are_typed() {
    let recipe =
        digits(&["optim.base_lr=1e-3", "schedule.epochs=3", "schedule.warmup_epochs=1", "seed=7"]).unwrap();
    assert_eq!((recipe.optim.base_lr, recipe.schedule.epochs, recipe.seed), (1e-3, 3, 7));
    let recipe = digits(&["data.source=folder", "data.folder=/some/where", "model.size=large"]).unwrap();
    assert_eq!((recipe.data.source, recipe.data.folder.unwrap()), (Source::Folder, "/some/where".into()));
    assert!(
        message(digits(&["optim.base_lr=fast"]))
            .contains("--set optim.base_lr=fast: optim.base_lr: invalid type")
    );
    assert!(message(digits(&["optim.base_rl=1"])).contains("did you mean `base_lr`?"));
    assert!(message(digits(&["optim.optimizer=adam"])).contains("did you mean `adamw`?"));
    assert!(message(digits(&["schedule.epochs=-1"])).contains("schedule.epochs"));
    assert!(message(digits(&["schedule.epochs=0"])).contains("schedule.epochs is 0"));
    assert!(message(digits(&["model.mask_ratio=1.5"])).contains("model.mask_ratio"));
    for bad in ["optim.base_lr", "=1", "optim..x=1", "optim.base_lr.x=1"] {
        assert!(message(digits(&[bad])).starts_with(&format!("--set {bad}: ")), "{bad}");
    }
}

#[test]
fn typos_name_file_line_and_key() {
    let good = BUILTIN[0].1;
    let parse = |text: &str| message(Recipe::parse(Path::new("my.toml"), text, &[]));
    let line = good.lines().position(|l| l.starts_with("base_lr")).unwrap() + 1;
    let typo = parse(&good.replacen("base_lr", "base_lrr", 1));
    assert_eq!(
        typo,
        format!("my.toml: line {line}: optim.base_lrr: unknown key `base_lrr`; did you mean `base_lr`?")
    );
    assert!(parse(&good.replacen("[optim]", "[optimizer]", 1)).contains("did you mean `optim`?"));
    assert!(parse("job = \"mae\"").contains("missing field"));
    assert!(parse("job = ").contains("line 1"));
    assert!(parse(&good.replacen("job = \"mae\"", "job = 3", 1)).starts_with("my.toml: line"));
}

#[test]
fn unknown_names() {
    assert!(message(Recipe::load("mae_digit", &[])).contains("did you mean `mae_digits`?"));
    assert!(message(Recipe::load("no/such/file.toml", &[])).starts_with("no/such/file.toml: "));
}
