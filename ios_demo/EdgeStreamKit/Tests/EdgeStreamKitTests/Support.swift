import DemoModel
import EdgeStreamKit
import Foundation
import Testing

/// The demo model, loaded once.
actor Demo {
    static let shared = Demo()
    static var isMissing: Bool { findDemoModel() == nil }
    private var loading: Task<Model, any Error>?

    var model: Model {
        get async throws {
            if loading == nil {
                loading = Task { try await Model.load(try #require(findDemoModel())) }
            }
            return try await loading!.value
        }
    }
}

func small(_ contextSize: Int = 256, system: String? = nil, isChat: Bool = true) -> SessionOptions {
    var options = SessionOptions(contextSize: contextSize, systemPrompt: system, isChat: isChat)
    options.threads = 1  // tests run side by side
    options.batchSize = 64
    return options
}

func seeded(_ maxTokens: Int?, seed: UInt32 = 7) -> AnswerOptions {
    AnswerOptions(sampling: Sampling(seed: seed), maxTokens: maxTokens, ignoresEnd: true)
}

func collect(_ stream: AsyncThrowingStream<Token, any Error>) async throws -> (text: String, tokens: [Token]) {
    var tokens: [Token] = []
    for try await token in stream {
        tokens.append(token)
    }
    return (tokens.map(\.text).joined(), tokens)
}

extension Session {
    func say(_ text: String, _ maxTokens: Int, seed: UInt32 = 7) async throws -> String {
        try await collect(answer(to: text, options: seeded(maxTokens, seed: seed))).text
    }
}

/// A folder that goes when the test ends.
final class Folder {
    let url = FileManager.default.temporaryDirectory.appendingPathComponent("edge-stream-\(UUID().uuidString)")

    init() throws {
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit {
        try? FileManager.default.removeItem(at: url)
    }

    func file(_ name: String) -> URL { url.appendingPathComponent(name) }
}

func error(of body: () async throws -> Void) async -> EdgeStreamError.Code? {
    do {
        try await body()
        return nil
    } catch {
        return (error as? EdgeStreamError)?.code
    }
}
