import ChatCore
@testable import ChatUI
import DemoModel
import EdgeStreamKit
import Foundation
import Testing

/// The system, in the test's hands. Everything else in these tests is real: the model, its tokens, the files.
@MainActor
private final class FakeSystem: ChatSystem {
    var availableMemory: UInt64?
    var footprint: UInt64? = 1000
    var thermalLevel = ThermalLevel.nominal
    var rests: [Duration] = []
    var backgroundTimes = 0
    private var continuation: AsyncStream<SystemEvent>.Continuation?

    func events() -> AsyncStream<SystemEvent> {
        AsyncStream { continuation = $0 }
    }

    func beginBackgroundTime() -> Int {
        backgroundTimes += 1
        return backgroundTimes
    }

    func endBackgroundTime(_ id: Int) {
        backgroundTimes -= 1
    }

    func sleep(for duration: Duration) async throws {
        rests.append(duration)
    }
}

/// The hub, with one file on it.
private struct FakeSource: ModelSource {
    let answer: Data
    let file: URL

    func files(of repository: HubRepository) async throws -> [HubRepository.File] {
        try repository.files(in: answer)
    }

    func download(
        _ file: HubRepository.File, onProgress: @escaping @Sendable (Double) -> Void
    ) async throws -> URL {
        onProgress(0.5)
        let copy = FileManager.default.temporaryDirectory.appendingPathComponent("download-\(UUID().uuidString)")
        try FileManager.default.copyItem(at: self.file, to: copy)
        return copy
    }
}

@MainActor
@Suite(.enabled(if: findDemoModel() != nil, "the demo model is not installed: make build"))
final class ChatModelTests {
    private let folder = FileManager.default.temporaryDirectory.appendingPathComponent("chat-\(UUID().uuidString)")
    private let system = FakeSystem()
    private let demo = findDemoModel()!

    init() throws {
        // the store's copy of the demo model is a link here: what is tested is not the disk
        let entry = folder.appendingPathComponent("models/demo")
        try FileManager.default.createDirectory(at: entry, withIntermediateDirectories: true)
        try FileManager.default.createSymbolicLink(
            at: entry.appendingPathComponent("demo.gguf"), withDestinationURL: demo)
        let manifest: [String: Any] = [
            "format": 1, "name": "Demo", "file": "demo.gguf", "bytes": 1, "n_ctx": 128,
            "sha256": String(repeating: "0", count: 64),
        ]
        try JSONSerialization.data(withJSONObject: manifest).write(to: entry.appendingPathComponent("manifest.json"))
    }

    deinit {
        try? FileManager.default.removeItem(at: folder)
    }

    /// An app that has just started.
    private func launch(answer: Data = Data()) throws -> ChatModel {
        let chat = try ChatModel(folder: folder, system: system, source: FakeSource(answer: answer, file: demo))
        chat.threads = 1
        chat.autosaveInterval = .seconds(1_000_000)
        chat.answerOptions = AnswerOptions(sampling: Sampling(seed: 5), maxTokens: 20, ignoresEnd: true)
        return chat
    }

    private func opened() async throws -> ChatModel {
        let chat = try launch()
        await chat.open(try #require(chat.models.first))
        #expect(chat.state.phase == .idle, "\(chat.state)")
        return chat
    }

    /// Sends without a limit, and returns once there is some text.
    private func beginLongAnswer(_ chat: ChatModel) async throws -> Task<Void, Never> {
        chat.answerOptions.maxTokens = nil
        let count = chat.state.messages.count
        let sending = Task { await chat.send("Tell me everything.") }
        while chat.state.messages.count == count || chat.state.messages.last?.text.isEmpty ?? true {
            await Task.yield()
        }
        return sending
    }

    private func event(_ event: SystemEvent, _ chat: ChatModel) async {
        await chat.handle(event)
    }

    private var session: URL { folder.appendingPathComponent("sessions/demo.session") }

    @Test func aConversation() async throws {
        let chat = try await opened()
        await chat.send("  Hello \n")
        await chat.send("")
        #expect(chat.state.messages.map(\.role) == [.user, .assistant])
        #expect(chat.state.messages[0].text == "Hello" && !chat.state.messages[1].text.isEmpty)
        #expect(chat.state.gauge.contextSize == 128 && chat.state.gauge.seen > 20 && chat.state.gauge.footprint == 1000)
        let first = chat.state.messages[1].text
        chat.answerOptions.sampling.seed = 6
        await chat.regenerate()
        #expect(chat.state.messages.count == 2 && chat.state.messages[1].text != first)
        await chat.clear()
        #expect(chat.state.messages.isEmpty && chat.state.gauge.seen == 0)
    }

    @Test func whatHasLeftTheWindowIsShownWhenItComesBack() async throws {
        let chat = try launch()
        chat.recallTokens = 64
        chat.answerOptions.maxTokens = 4
        await chat.open(try #require(chat.models.first))
        await chat.send("My friend Anna owns a blue kite.")
        for hour in 0..<12 {
            await chat.send("The hour of the day is \(hour).")
        }
        #expect(chat.state.messages.allSatisfy { $0.recalled == nil })
        await chat.send("What does my friend Anna own?")
        let recalled = try #require(chat.state.messages.last?.recalled)
        #expect(recalled.text == "My friend Anna owns a blue kite." && recalled.isFromUser)
        let log = session.appendingPathExtension("log")
        #expect(FileManager.default.fileExists(atPath: log.path))
        await chat.remove(try #require(chat.current))
        #expect(!FileManager.default.fileExists(atPath: log.path))
    }

    @Test func longerThanTheCacheAtAConstantFill() async throws {
        let chat = try await opened()
        chat.answerOptions.maxTokens = 100
        for _ in 0..<3 {
            await chat.send("Go on.")
        }
        #expect(chat.state.gauge.seen > 300 && chat.state.gauge.cached <= 128 && chat.state.gauge.fill <= 1)
    }

    @Test func stopping() async throws {
        let chat = try await opened()
        let sending = try await beginLongAnswer(chat)
        await chat.stop()
        await sending.value
        #expect(chat.state.phase == .idle && chat.state.messages.last?.isCut == true)
        chat.answerOptions.maxTokens = 5
        await chat.send("And now?")
        #expect(chat.state.messages.count == 4)
    }

    //
    // background
    //

    @Test func theBackgroundSavesAndReleasesAndTheForegroundGoesOn() async throws {
        let chat = try await opened()
        let sending = try await beginLongAnswer(chat)
        await event(.background, chat)
        await sending.value
        #expect(chat.state.phase == .suspended(.background) && system.backgroundTimes == 0)
        let messages = chat.state.messages.map(\.text)
        let saved = try await Session.peek(session)
        #expect(saved.messageCount == 2)

        await event(.foreground, chat)
        await chat.idle()
        #expect(chat.state.phase == .idle && chat.state.messages.map(\.text) == messages)
        #expect(chat.state.gauge.seen == saved.seen)
        chat.answerOptions.maxTokens = 5
        await chat.send("Where were we?")
        #expect(chat.state.messages.count == 4)
    }

    @Test func killedInTheBackgroundItGoesOnIdentically() async throws {
        func goOn(_ chat: ChatModel) async -> [String] {
            await chat.send("Go on.")
            return chat.state.messages.map(\.text)
        }
        let chat = try await opened()
        chat.answerOptions.maxTokens = 150  // beyond the cache
        await chat.send("Tell me a story.")
        await event(.background, chat)
        let copy = session.appendingPathExtension("copy")
        try FileManager.default.copyItem(at: session, to: copy)
        await event(.foreground, chat)
        await chat.idle()
        let expected = await goOn(chat)
        await chat.close()

        try FileManager.default.removeItem(at: session)
        try FileManager.default.moveItem(at: copy, to: session)  // as if it had been killed there
        let again = try await opened()
        again.answerOptions.maxTokens = 150
        #expect(again.state.messages.map(\.text) == Array(expected.prefix(2)))
        #expect(await goOn(again) == expected)
    }

    @Test func intoTheBackgroundWhileLoading() async throws {
        let chat = try await opened()
        await event(.background, chat)
        await event(.foreground, chat)  // begins to load
        await event(.background, chat)
        #expect(chat.state.phase == .suspended(.background))
        await event(.foreground, chat)
        await chat.idle()
        #expect(chat.state.phase == .idle)
    }

    @Test func autosaved() async throws {
        let chat = try await opened()
        await chat.send("Hello")
        #expect(!FileManager.default.fileExists(atPath: session.path))
        chat.autosaveInterval = .zero
        await chat.send("Hello")
        #expect(try await Session.peek(session).messageCount == 4)
    }

    @Test func aSessionThatCannotBeRestoredIsKept() async throws {
        try FileManager.default.createDirectory(at: session.deletingLastPathComponent(), withIntermediateDirectories: true)
        try Data("not a session".utf8).write(to: session)
        let chat = try await opened()
        #expect(chat.state.notice == .sessionLost("demo.session.old"))
        #expect(try Data(contentsOf: session.appendingPathExtension("old")) == Data("not a session".utf8))
    }

    @Test func sessionsSetAsideBeforeAreKept() async throws {
        try FileManager.default.createDirectory(at: session.deletingLastPathComponent(), withIntermediateDirectories: true)
        for name in ["first", "second"] {
            try Data(name.utf8).write(to: session)
            let chat = try await opened()
            #expect(chat.state.notice == .sessionLost(name == "first" ? "demo.session.old" : "demo.session.old2"))
        }
        #expect(try Data(contentsOf: session.appendingPathExtension("old")) == Data("first".utf8))
        #expect(try Data(contentsOf: session.appendingPathExtension("old2")) == Data("second".utf8))
    }

    /// While `body` runs, a file is in the place of the folder of sessions: saving fails.
    private func withoutSessions(_ body: () async throws -> Void) async throws {
        let folder = session.deletingLastPathComponent()
        try FileManager.default.removeItem(at: folder)
        try Data().write(to: folder)
        try await body()
        try FileManager.default.removeItem(at: folder)
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: false)
    }

    private func isFailure(_ notice: ChatState.Notice?) -> Bool {
        if case .failure = notice { true } else { false }
    }

    @Test func whatCannotBeSavedStaysOpen() async throws {
        let chat = try await opened()
        await chat.send("Hello")
        let messages = chat.state.messages
        let entry = try #require(chat.current)
        system.availableMemory = 1 << 20
        try await withoutSessions {
            #expect(await chat.close() == false)
            #expect(isFailure(chat.state.notice))
            chat.dismissNotice()
            await chat.open(entry)
            #expect(isFailure(chat.state.notice))
            for event in [SystemEvent.background, .memoryWarning] {
                chat.dismissNotice()
                await self.event(event, chat)
                #expect(isFailure(chat.state.notice))
            }
            #expect(chat.state.phase == .idle && chat.state.messages == messages && chat.current == entry)
        }
        #expect(await chat.close())
        #expect(chat.state.phase == .noModel && chat.current == nil)
        #expect(try await Session.peek(session).messageCount == 2)
    }

    @Test func removingTheOpenModelNeedsNoSave() async throws {
        let chat = try await opened()
        await chat.send("Hello")
        try await withoutSessions {
            await chat.remove(try #require(chat.current))
        }
        #expect(chat.current == nil && chat.models.isEmpty)
        #expect(chat.state.phase == .noModel && chat.state.notice == nil)
    }

    //
    // a long transcript
    //

    private func section(_ tag: Data, _ bytes: Data) -> Data {
        let length = withUnsafeBytes(of: UInt64(bytes.count).littleEndian) { Data($0) }
        let table = (0..<256).map { n in
            (0..<8).reduce(UInt32(n)) { c, _ in c >> 1 ^ (c & 1 == 0 ? 0 : 0xEDB8_8320) }
        }
        var crc = ~UInt32(0)
        for byte in [UInt8](tag + length + bytes) {
            crc = crc >> 8 ^ table[Int(UInt8(truncatingIfNeeded: crc) ^ byte)]
        }
        return tag + withUnsafeBytes(of: (~crc).littleEndian) { Data($0) } + length + bytes
    }

    /// Makes the first answer in a session file a million bytes long, which is all that a transcript keeps.
    private func fillTranscript(_ file: URL) throws {
        // a section: tag, CRC-32 of tag, size and bytes, size, bytes
        var data = try Data(contentsOf: file)
        let start = try #require(data.range(of: Data(#"{"format":2,"#.utf8))).lowerBound
        let size = data[(start - 8)..<start].reversed().reduce(0) { $0 << 8 | Int($1) }
        let json = try JSONSerialization.jsonObject(with: data[start..<(start + size)])
        var conversation = try #require(json as? [String: Any])
        var messages = try #require(conversation["messages"] as? [[String: Any]])
        messages[1]["content"] = String(repeating: "x", count: 1_000_000)
        conversation["messages"] = messages
        let new = try JSONSerialization.data(withJSONObject: conversation)
        let length = withUnsafeBytes(of: UInt64(new.count).littleEndian) { Data($0) }
        let user = section(data[(start - 16)..<(start - 12)], new)
        data.replaceSubrange((start - 16)..<(start + size), with: user)
        data.replaceSubrange(72..<80, with: length)  // the header, at 16, has the size as well
        data.replaceSubrange(16..<104, with: section(data[16..<20], data[32..<104]))
        try data.write(to: file)
    }

    @Test func aTurnStaysOnTheScreenWhereTheTranscriptDropsOlderOnes() async throws {
        let first = try await opened()
        await first.send("Hello")
        await first.close()
        try fillTranscript(session)
        let chat = try await opened()
        #expect(chat.state.notice == nil && chat.state.messages.last?.text.utf8.count == 1_000_000)
        await chat.send("Still there?")
        #expect(chat.state.messages.map(\.role) == [.user, .assistant] && chat.state.droppedCount == 2)
        #expect(chat.state.messages.first?.text == "Still there?" && chat.state.messages.last?.text.isEmpty == false)
        await chat.close()
        #expect(try await Session.peek(session).messageCount == 2)
    }

    //
    // memory
    //

    @Test func aModelThatDoesNotFitIsRefusedBeforeLoading() async throws {
        let chat = try launch()
        system.availableMemory = 100 << 20
        await chat.open(try #require(chat.models.first))
        #expect(chat.state.phase == .noModel)
        guard case .failure(let sentence) = chat.state.notice else {
            Issue.record("no notice")
            return
        }
        #expect(sentence.contains("more than there is"))
    }

    @Test func aSmallerCacheWhereTheWantedOneDoesNotFit() async throws {
        let manifest = folder.appendingPathComponent("models/demo/manifest.json")
        let text = try String(contentsOf: manifest, encoding: .utf8).replacingOccurrences(of: ":128", with: ":65536")
        try Data(text.utf8).write(to: manifest)
        let chat = try launch()
        chat.budget = MemoryBudget(reserve: 0)
        var options = SessionOptions(contextSize: 4096)
        options.threads = 1
        system.availableMemory = try await Model.memoryNeed(of: demo, session: options).peak
        await chat.open(try #require(chat.models.first))
        #expect(chat.state.gauge.contextSize == 4096 && chat.state.notice == .smallerCache(4096))
    }

    @Test func aMemoryWarningSavesAndIfNeedBeReleases() async throws {
        let chat = try await opened()
        let sending = try await beginLongAnswer(chat)
        system.availableMemory = 4 << 30
        await event(.memoryWarning, chat)
        await sending.value
        #expect(chat.state.phase == .idle && chat.state.notice == .memoryShort)
        #expect(try await Session.peek(session).messageCount == 2)

        system.availableMemory = 1 << 20
        await event(.memoryWarning, chat)
        #expect(chat.state.phase == .suspended(.memory))
        await event(.foreground, chat)
        #expect(chat.state.phase == .suspended(.memory))  // not before it is wanted
        system.availableMemory = 4 << 30
        chat.answerOptions.maxTokens = 5
        await chat.send("Still there?")
        #expect(chat.state.phase == .idle && chat.state.messages.count == 4)
    }

    //
    // heat
    //

    @Test func heatSlowsAndPauses() async throws {
        let chat = try await opened()
        await event(.thermal(.serious), chat)
        await chat.send("Hello")
        #expect(system.rests.count == 19 && system.rests.allSatisfy { $0 > .zero })

        await event(.thermal(.fair), chat)
        system.rests = []
        let sending = try await beginLongAnswer(chat)
        await event(.thermal(.critical), chat)
        #expect(chat.state.notice == .tooHot)
        await chat.pausedByHeat()
        let paused = chat.state.gauge.seen
        for _ in 0..<1000 { await Task.yield() }
        #expect(chat.state.gauge.seen == paused && chat.state.phase == .writing)
        await event(.thermal(.nominal), chat)
        #expect(chat.state.notice == nil)
        while chat.state.gauge.seen == paused { await Task.yield() }
        await event(.thermal(.critical), chat)
        await chat.stop()  // also while it is paused
        await sending.value
        #expect(chat.state.phase == .idle && system.rests.isEmpty)
    }

    //
    // models
    //

    @Test func importing() async throws {
        let chat = try launch()
        await chat.add(folder.appendingPathComponent("nothing"))
        #expect(chat.state.notice == .failure("nothing cannot be read."))
        await chat.add(demo)
        #expect(chat.models.count == 2 && chat.arriving.isEmpty)
        let imported = try #require(chat.models.first { $0.id != "demo" })
        #expect(imported.manifest.sha256 == (try await sha256(of: demo)))
        await chat.remove(imported)
        #expect(chat.models.count == 1)
    }

    /// Of `edge-stream export-ios -m demo`, whose place EDGE_STREAM_EXPORT gives (tests/test_export_ios.py).
    @Test(.enabled(if: ProcessInfo.processInfo.environment["EDGE_STREAM_EXPORT"] != nil, "no exported folder is given"))
    func whatExportIOSWroteIsImportedAndRuns() async throws {
        let export = URL(fileURLWithPath: try #require(ProcessInfo.processInfo.environment["EDGE_STREAM_EXPORT"]))
        let chat = try launch()
        await chat.add(export)
        let entry = try #require(chat.models.first { $0.id != "demo" }, "\(String(describing: chat.state.notice))")
        #expect(entry.manifest == (try ModelManifest.read(export.appendingPathComponent("manifest.json"))))
        await chat.open(entry)
        #expect(chat.state.gauge.contextSize == entry.manifest.contextSize)
        await chat.send("Hello")
        #expect(chat.state.messages.count == 2 && chat.state.messages[1].text.isEmpty == false)
        await chat.close()
    }

    @Test(arguments: [true, false])
    func downloading(isIntact: Bool) async throws {
        let size = try #require(try FileManager.default.attributesOfItem(atPath: demo.path)[.size] as? NSNumber)
        let sum = isIntact ? try await sha256(of: demo) : String(repeating: "0", count: 64)
        let answer = """
            [{"path": "small.gguf", "lfs": {"oid": "\(sum)", "size": \(size)}}]
            """
        let chat = try launch(answer: Data(answer.utf8))
        let files = try await chat.files(of: try #require(HubRepository("user/repo")))
        await chat.download(try #require(files.first))
        #expect(chat.models.map(\.id) == (isIntact ? ["demo", "small"] : ["demo"]))
        #expect((chat.state.notice == nil) == isIntact)
    }
}
